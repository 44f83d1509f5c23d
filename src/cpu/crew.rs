//! Work that the calling thread begins at once, and that threads of a pool join as they wake.
//!
//! A caller that only waited would wait for threads that have yet to wake, or that others keep from
//! their cores.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::ThreadPool;

/// Who works on something, and whether others may still begin.
#[derive(Default)]
struct State {
    is_closed: bool,
    inside: usize,
    panic: Option<Box<dyn Any + Send>>,
}

#[derive(Default)]
struct Door {
    state: Mutex<State>,
    left: Condvar,
}

impl Door {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False where the work is over.
    fn enter(&self) -> bool {
        let mut state = self.state();
        if !state.is_closed {
            state.inside += 1;
        }
        !state.is_closed
    }

    fn leave(&self, result: Result<(), Box<dyn Any + Send>>) {
        let mut state = self.state();
        state.inside -= 1;
        if let Err(panic) = result {
            state.panic = Some(panic);
        }
        drop(state);
        self.left.notify_all();
    }

    /// Nobody begins any more; returns when all who had begun are done.
    fn close(&self) -> Option<Box<dyn Any + Send>> {
        let mut state = self.state();
        state.is_closed = true;
        while state.inside > 0 {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.panic.take()
    }
}

/// Closes the door also when the caller's own share panics.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A reference whose lifetime the door vouches for.
struct Erased(*const (dyn Fn() + Sync));

// SAFETY: what it points to is `Sync`, and is used by whoever the door has let in only.
unsafe impl Send for Erased {}

/// Calls `work` on this thread, and on as many as `helpers` threads of the pool that are free before
/// this thread returns from it. A panic of any of them is passed on.
pub fn together(pool: &ThreadPool, helpers: usize, work: &(dyn Fn() + Sync)) {
    let door = Arc::new(Door::default());
    let closing = Closing(&door);
    for _ in 0..helpers {
        // SAFETY: only the lifetime changes. It is followed between `enter` and `leave` alone, and
        // this function, which holds the reference, does not return or unwind before `close` has
        // seen all leave and let nobody in any more.
        let erased = Erased(unsafe {
            std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync)>(work)
        });
        let door = Arc::clone(&door);
        pool.spawn(move || {
            let erased = erased;
            if door.enter() {
                // SAFETY: as above.
                door.leave(catch_unwind(AssertUnwindSafe(|| unsafe { (*erased.0)() })));
            }
        });
    }
    work();
    std::mem::forget(closing);
    if let Some(panic) = door.close() {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rayon::ThreadPoolBuilder;

    use super::*;

    fn pool() -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(3).build().unwrap()
    }

    #[test]
    fn everybody_has_left_when_it_returns() {
        let pool = pool();
        for round in 0..2000 {
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            together(&pool, 3, &|| {
                begun.fetch_add(1, Ordering::SeqCst);
                for _ in 0..round {
                    std::hint::spin_loop();
                }
                ended.fetch_add(1, Ordering::SeqCst);
            });
            let begun = begun.load(Ordering::SeqCst);
            assert!((1..=4).contains(&begun));
            assert_eq!(begun, ended.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_busy_pool_is_not_waited_for() {
        let pool = pool();
        let (open, wait) = std::sync::mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..3 {
            let wait = Arc::clone(&wait);
            pool.spawn(move || {
                let _ = wait.lock().unwrap().recv();
            });
        }
        let calls = AtomicUsize::new(0);
        together(&pool, 3, &|| {
            calls.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        drop(open);
    }

    #[test]
    fn panics_reach_the_caller_from_every_thread() {
        let pool = pool();
        let caller = std::thread::current().id();
        for own in [true, false] {
            let inside = AtomicUsize::new(0);
            let work = || {
                inside.fetch_add(1, Ordering::SeqCst);
                while inside.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
                assert!((std::thread::current().id() == caller) != own, "expected here");
            };
            let result = catch_unwind(AssertUnwindSafe(|| together(&pool, 3, &work)));
            let panic = result.unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"expected here"));
        }
        // The pool goes on.
        together(&pool, 3, &|| {});
    }
}
