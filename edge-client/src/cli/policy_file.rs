//! The owner's policy file, and whether it has changed since it was read. `member.rs` looks while it waits.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::exit::BadInput;
use crate::{policy::Policy, settings, store::Stamp};

/// `policy.toml` in the state directory, which need not be there, or a file that was named, which must.
#[derive(Debug)]
pub(super) struct PolicyFile {
    path: PathBuf,
    is_named: bool,
    /// As it was when it was read last.
    read: Option<Stamp>,
    /// As it was at the last look.
    seen: Option<Stamp>,
}

impl PolicyFile {
    pub(super) fn of(directory: &Path, named: Option<&Path>) -> Self {
        let path = named.map_or_else(|| directory.join("policy.toml"), Path::to_owned);
        Self { path, is_named: named.is_some(), read: None, seen: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn read(&mut self) -> Result<Policy> {
        // Before it is read: what is written meanwhile is another file at the next look.
        self.read = self.stamp();
        self.seen = self.read;
        self.parse(self.text()?)
    }

    fn text(&self) -> Result<Option<String>> {
        Ok(if self.is_named {
            Some(settings::read_named(&self.path)?)
        } else {
            settings::read_text(&self.path)?
        })
    }

    /// Without a file the defaults are in force.
    fn parse(&self, text: Option<String>) -> Result<Policy> {
        let Some(text) = text else { return Ok(Policy::default()) };
        // What a full disk leaves of a file that was written anew is no wish for the defaults.
        if text.trim().is_empty() {
            let path = self.path.display();
            let text = format!("{path}: it is empty; with no policy file the defaults are in force");
            return Err(BadInput(text).into());
        }
        Policy::from_toml(&text).with_context(|| self.path.display().to_string())
    }

    /// What the file says, once it has changed and was the same at two looks: an editor may be at it, and half a policy, or
    /// none for a moment, could allow what the whole one forbids.
    pub(super) fn changed(&mut self) -> Option<Result<Policy>> {
        let now = self.stamp();
        let is_settled = now == std::mem::replace(&mut self.seen, now);
        if now == self.read || !is_settled {
            return None;
        }
        let text = self.text();
        if self.stamp() != now {
            // Somebody began to write it meanwhile.
            return None;
        }
        self.read = now;
        Some(text.and_then(|text| self.parse(text)))
    }

    /// One that cannot be looked at is as one that is not there; reading it says what is wrong.
    fn stamp(&self) -> Option<Stamp> {
        Stamp::at(&self.path).ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::exit;

    fn power(read: Option<Result<Policy>>) -> Option<bool> {
        read.map(|read| read.unwrap().when.power)
    }

    #[test]
    fn a_change_counts_once_it_is_over_and_only_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = PolicyFile::of(directory.path(), None);
        let write = |text: &str| fs::write(directory.path().join("policy.toml"), text).unwrap();
        assert_eq!(file.read().unwrap(), Policy::default());
        assert!(file.changed().is_none());
        write("");
        assert!(file.changed().is_none(), "it may not be whole");
        write("[when]\npower = false\n");
        assert!(file.changed().is_none(), "it is still written");
        assert_eq!(power(file.changed()), Some(false));
        assert!(file.changed().is_none());
        // A wrong one is told once.
        write("[when]\npower = 7\n");
        assert!(file.changed().is_none());
        let error = format!("{:#}", file.changed().unwrap().unwrap_err());
        assert!(error.contains("policy.toml") && error.contains("power"), "{error}");
        assert!(file.changed().is_none());
        write("\n");
        assert!(file.changed().is_none());
        let error = file.changed().unwrap().unwrap_err().to_string();
        assert!(error.contains("it is empty"), "{error}");
        fs::remove_file(file.path()).unwrap();
        assert!(file.changed().is_none());
        assert_eq!(power(file.changed()), Some(true), "the default");
        assert!(file.changed().is_none());
    }

    #[test]
    fn an_empty_file_is_no_policy_at_the_start_either() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        for named in [None, Some(path.as_path())] {
            let mut file = PolicyFile::of(directory.path(), named);
            for empty in ["", "\n \n"] {
                fs::write(&path, "[when]\npower = false\n").unwrap();
                file.read().unwrap();
                fs::write(&path, empty).unwrap();
                assert!(file.changed().is_none());
                let later = file.changed().unwrap().unwrap_err();
                let error = PolicyFile::of(directory.path(), named).read().unwrap_err();
                assert_eq!(error.to_string(), later.to_string());
                assert!(error.to_string().contains("policy.toml: it is empty"), "{error}");
                assert_eq!(exit::code(&error), 3);
            }
        }
        fs::write(&path, "# nothing but the defaults\n").unwrap();
        assert_eq!(PolicyFile::of(directory.path(), None).read().unwrap(), Policy::default());
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let named = directory.path().join("mine.toml");
        fs::write(&named, "[when]\npower = false\n").unwrap();
        let mut file = PolicyFile::of(directory.path(), Some(&named));
        assert!(!file.read().unwrap().when.power);
        fs::remove_file(&named).unwrap();
        assert!(file.changed().is_none());
        assert!(file.changed().unwrap().is_err());
        assert!(file.changed().is_none());
    }
}
