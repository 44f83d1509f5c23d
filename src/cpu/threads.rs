//! How many threads a call may use, and where they come from.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cpu::{crew, openmp};

/// Below this many elements of work a call runs inline: waking a pool costs more than it saves.
const INLINE_BELOW: usize = 1 << 15;

/// The number of threads that one call may use.
#[derive(Clone, Copy, Debug)]
pub struct Threads(usize);

/// Pools by size, and the process they belong to: threads do not survive a fork.
struct Pools {
    process: u32,
    by_size: HashMap<usize, Arc<ThreadPool>>,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

impl Threads {
    pub fn new(count: usize) -> Self {
        Self(count.max(1))
    }

    pub fn count(self) -> usize {
        self.0
    }

    /// Calls `task` for every item of `tasks`, whose order does not matter.
    ///
    /// `elements` is the size of the whole work. How it is cut into tasks must not depend on the
    /// number of threads; then neither do the results.
    pub fn for_each<I, F>(self, elements: usize, tasks: Vec<I>, task: F)
    where
        I: Send,
        F: Fn(I) + Sync,
    {
        if self.0 == 1 || tasks.len() < 2 || elements < INLINE_BELOW {
            return tasks.into_iter().for_each(task);
        }
        let queue = Mutex::new(tasks.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some(item) = next() {
                task(item);
            }
        };
        // A team of another size than PyTorch's own would be made anew every time.
        if !openmp::together(self.0, &work) {
            match pool(self.0 - 1) {
                Some(pool) => crew::together(&pool, self.0 - 1, &work),
                None => work(),
            }
        }
    }

    /// Like [`Threads::for_each`], with the results in the order of the tasks.
    pub fn map<I, R, F>(self, elements: usize, tasks: Vec<I>, task: F) -> Vec<R>
    where
        I: Send,
        R: Send,
        F: Fn(I) -> R + Sync,
    {
        let mut results: Vec<Option<R>> = tasks.iter().map(|_| None).collect();
        let tasks = tasks.into_iter().zip(&mut results).collect();
        self.for_each(elements, tasks, |(item, result)| *result = Some(task(item)));
        results.into_iter().flatten().collect()
    }
}

/// A pool of so many threads, or none where the system gives no threads.
fn pool(size: usize) -> Option<Arc<ThreadPool>> {
    let mut guard = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if let Some(old) = guard.take_if(|pools| pools.process != process) {
        // Dropping a pool joins its threads, which this process does not have.
        std::mem::forget(old);
    }
    let pools = guard.get_or_insert_with(|| Pools { process, by_size: HashMap::new() });
    if let Some(pool) = pools.by_size.get(&size) {
        return Some(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(size)
        .thread_name(|i| format!("gradpress-{i}"))
        .build()
        .ok()?;
    let pool = Arc::new(pool);
    pools.by_size.insert(size, Arc::clone(&pool));
    Some(pool)
}
