//! Compiled modules on disk. Whatever is wrong with a file or a folder only costs a compilation.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, process};

use sha2::{Digest, Sha256};

/// Bytes of the digest behind an image, which finds what was cut off or overwritten.
const SEAL: usize = 32;

/// `$GRADPRESS_CACHE_DIR`, else `$XDG_CACHE_HOME/gradpress`, else `~/.cache/gradpress`.
pub fn folder() -> Option<PathBuf> {
    choose(["GRADPRESS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"].map(env::var_os))
}

/// As [`folder`], from the values of its three variables; an empty one counts as unset.
fn choose([own, shared, home]: [Option<OsString>; 3]) -> Option<PathBuf> {
    let given = |value: Option<OsString>| value.filter(|v| !v.is_empty()).map(PathBuf::from);
    given(own)
        .or_else(|| given(shared).map(|folder| folder.join("gradpress")))
        .or_else(|| given(home).map(|folder| folder.join(".cache").join("gradpress")))
}

/// Stands for everything that an image depends on.
pub fn key<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With their lengths, parts that are cut elsewhere never look the same.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The image in a file that [`store`] wrote, if it is whole.
pub fn load(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let length = bytes.len().checked_sub(SEAL)?;
    let (image, seal) = bytes.split_at(length);
    if Sha256::digest(image)[..] != *seal {
        return None;
    }
    bytes.truncate(length);
    Some(bytes)
}

/// Keeps an image. It is written beside its place and moved there, so that no reader ever sees
/// half of it and no lock is needed: two writers write the same.
pub fn store(path: &Path, image: &[u8]) {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let scratch = path.with_extension(format!("{}-{number}.tmp", process::id()));
    let sealed = [image, &Sha256::digest(image)[..]].concat();
    let made = path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok());
    if !made || fs::write(&scratch, sealed).is_err() || fs::rename(&scratch, path).is_err() {
        // Nothing to be done about it: the next process compiles again.
        let _ = fs::remove_file(&scratch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_follow_the_environment() {
        let of = |values: [Option<&str>; 3]| choose(values.map(|v| v.map(OsString::from)));
        assert_eq!(of([Some("/a"), Some("/b"), Some("/c")]), Some("/a".into()));
        assert_eq!(of([Some(""), Some("/b"), Some("/c")]), Some("/b/gradpress".into()));
        assert_eq!(of([None, Some(""), Some("/c")]), Some("/c/.cache/gradpress".into()));
        assert_eq!(of([None, None, None]), None);
    }

    #[test]
    fn keys_see_where_parts_end() {
        let key = |parts: &[&str]| key(parts.iter().copied());
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["ab"]), key(&["ab", ""]));
    }

    #[test]
    fn only_whole_images_come_back() {
        let folder = env::temp_dir().join(format!("gradpress-cache-{}", process::id()));
        let path = folder.join("deep").join("one.cubin");
        assert_eq!(load(&path), None);
        store(&path, b"image");
        assert_eq!(load(&path).as_deref(), Some(&b"image"[..]));
        let whole = fs::read(&path).unwrap();
        for broken in [&whole[..whole.len() - 1], &whole[1..], b"", b"short"] {
            fs::write(&path, broken).unwrap();
            assert_eq!(load(&path), None);
        }
        store(&path, b"image");
        assert!(load(&path).is_some());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
        store(Path::new("/proc/no/such/folder/one.cubin"), b"image");
    }
}
