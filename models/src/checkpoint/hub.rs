//! Names of the Hugging Face hub, looked up in the local cache. Nothing is ever downloaded here.
//!
//! A name is `org/name`, `org/name@revision`, or either with `:file`. The cache holds
//! `models--org--name/refs/<revision>` (a commit) and `snapshots/<commit>/<file>` (links to blobs).

use std::env;
use std::path::{Path, PathBuf};

use crate::ModelError;

/// The path that `name` means: an existing file or folder, else an entry of the local cache.
///
/// # Errors
/// If it is neither; the message says how to get the files.
pub fn resolve(name: &str) -> Result<PathBuf, ModelError> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.into());
    }
    let not_found = |why: &str| Err(ModelError::file(path, format!("is not there{why}; check the path")));
    let Some(wanted) = HubName::parse(name) else { return not_found("") };
    match cache() {
        Some(cache) => wanted.find(&cache),
        None => not_found(", and there is no Hugging Face cache to look in (set HF_HOME)"),
    }
}

/// The folder of the local cache, by the variables that the hub's own tools read.
pub fn cache() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/huggingface/hub")))
}

/// A parsed name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`.
    pub repository: String,
    /// Branch, tag or commit; `main` if not given.
    pub revision: String,
    /// Path inside the repository.
    pub file: Option<String>,
}

impl HubName {
    /// Parses `org/name[@revision][:file]`; `None` if `text` has another form or would leave the cache.
    pub fn parse(text: &str) -> Option<HubName> {
        let (text, file) = match text.split_once(':') {
            Some((text, file)) => (text, Some(file)),
            None => (text, None),
        };
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && part.chars().all(word) && !part.starts_with('.')
        };
        let path = |path: &str| path.split('/').all(plain);
        if !plain(org) || !plain(name) || !path(revision) || !file.is_none_or(path) {
            return None;
        }
        Some(HubName { repository: repository.into(), revision: revision.into(), file: file.map(String::from) })
    }

    /// Looks it up below `cache`.
    ///
    /// # Errors
    /// If the repository, the revision or the file is not there.
    pub fn find(&self, cache: &Path) -> Result<PathBuf, ModelError> {
        let folder = cache.join(format!("models--{}", self.repository.replace('/', "--")));
        let what =
            [Some(self.repository.as_str()), self.file.as_deref()].into_iter().flatten().collect::<Vec<_>>().join(" ");
        let missing = |problem: &str| ModelError::file(&folder, format!("{problem}; get it with `hf download {what}`"));
        if !folder.is_dir() {
            return Err(missing(&format!("`{}` is not in the local cache", self.repository)));
        }
        let reference = folder.join("refs").join(&self.revision);
        let commit = match std::fs::read_to_string(&reference) {
            Ok(commit) => commit.trim().to_string(),
            // A commit is its own reference.
            Err(_) => self.revision.clone(),
        };
        let snapshot = folder.join("snapshots").join(&commit);
        if HubName::parse(&format!("a/b@{commit}")).is_none() || !snapshot.is_dir() {
            return Err(missing(&format!("revision `{}` is not in the local cache", self.revision)));
        }
        match &self.file {
            None => Ok(snapshot),
            Some(file) if snapshot.join(file).exists() => Ok(snapshot.join(file)),
            Some(file) => Err(missing(&format!("`{file}` is not in the local cache"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_are_parsed() {
        let name = HubName::parse("Lightricks/LTX-2.3@v1:vae/x.safetensors").unwrap();
        assert_eq!((name.repository.as_str(), name.revision.as_str()), ("Lightricks/LTX-2.3", "v1"));
        assert_eq!(name.file.as_deref(), Some("vae/x.safetensors"));
        assert_eq!(HubName::parse("a/b").unwrap().revision, "main");
        for bad in ["a", "a/b/c", "../b", "a/b:../x", "a/b:/etc", "a/b@../x", "/a/b", "a/b:", "a b/c"] {
            assert_eq!(HubName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn files_are_found_through_references() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--a--b");
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::create_dir_all(folder.join("snapshots/123")).unwrap();
        fs::write(folder.join("refs/main"), "123\n").unwrap();
        fs::write(folder.join("snapshots/123/x.safetensors"), "").unwrap();
        let find = |name: &str| HubName::parse(name).unwrap().find(cache.path());
        assert!(find("a/b").unwrap().ends_with("snapshots/123"));
        assert!(find("a/b@123:x.safetensors").unwrap().ends_with("123/x.safetensors"));
        let missing = |name: &str| find(name).unwrap_err().to_string();
        assert!(missing("a/b:y").contains("hf download a/b y`"), "{}", missing("a/b:y"));
        assert!(missing("a/b@v9").contains("revision `v9`"));
        assert!(missing("a/c").contains("hf download a/c`"));
    }
}
