//! Why a store could not do what was asked, by what a caller may conclude. Of `store.rs`.

use super::owner::MARK;

pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It certainly did not happen.
    #[error("{operation} `{subject}` was not done")]
    Determinate {
        /// The operation's verb.
        operation: &'static str,
        /// The log, key or digest.
        subject: String,
        /// The backend's own error.
        #[source]
        source: Cause,
    },
    /// It may or may not have happened.
    #[error("{operation} `{subject}` may or may not have been done")]
    Indeterminate {
        /// The operation's verb.
        operation: &'static str,
        /// The log, key or digest.
        subject: String,
        /// The backend's own error.
        #[source]
        source: Cause,
    },
    /// Somebody else moved the head. Nothing was written.
    #[error("log `{log}`: expected sequence {expected}, got {found}")]
    Conflict {
        /// The log.
        log: String,
        /// What the caller believed.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// There is no such thing.
    #[error("{subject} is not stored")]
    Missing {
        /// The log, key or digest.
        subject: String,
    },
    /// A lease ran out and another worker took the item.
    #[error("item `{key}` of queue `{queue}` is no longer leased to `{owner}`")]
    LeaseLost {
        /// The queue.
        queue: String,
        /// The key.
        key: String,
        /// Who believed to hold it.
        owner: String,
    },
    /// What is stored has the form of another version of this program. Nothing was touched.
    #[error(
        "database {subject}: expected schema version {expected}, got {got}; docs/operations.md says how to upgrade"
    )]
    Schema {
        /// The database.
        subject: String,
        /// This program's.
        expected: i64,
        /// What is there.
        got: i64,
    },
    /// The objects are of another federation, whose files this one would delete. Nothing was touched.
    #[error(
        "storage.objects: expected objects of this database's federation, {expected}, got those of {got}, as the object \
         `{MARK}` there says; docs/operations.md says more"
    )]
    Foreign {
        /// The database's.
        expected: String,
        /// Whose they are.
        got: String,
    },
    /// Too large, too long, or not what its digest says. Nothing was written.
    #[error("{subject}: expected {expected}, got {got}")]
    Refused {
        /// The log, key or digest.
        subject: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
}

impl StoreError {
    /// True when the operation certainly left no trace.
    pub fn is_determinate(&self) -> bool {
        !matches!(self, Self::Indeterminate { .. })
    }

    pub(super) fn lease_lost(queue: &str, key: &str, owner: &str) -> Self {
        Self::LeaseLost { queue: queue.to_owned(), key: key.to_owned(), owner: owner.to_owned() }
    }

    pub(crate) fn not_done(operation: &'static str, subject: &str, source: impl Into<Cause>) -> Self {
        Self::Determinate { operation, subject: subject.to_owned(), source: source.into() }
    }

    pub(crate) fn unsure(operation: &'static str, subject: &str, source: impl Into<Cause>) -> Self {
        Self::Indeterminate { operation, subject: subject.to_owned(), source: source.into() }
    }
}
