//! The state directory, as far as the endpoint has to do with it: where chats are kept, and what its owner wants forgotten
//! there meanwhile. No key stays open here: each writing reads it anew, so that it may go with `forget --all`.
//! `cli/serve.rs` opens it; `keep.rs` holds what is written here later.

use std::path::{Path, PathBuf};

use commonweal_transport::Clock;
use tokio::sync::watch;

use super::refusals::Refusal;
use crate::{
    era::{self, Era},
    forget,
    keys::KeyPlace,
    personal,
    policy::Policy,
    rows::Parsed,
    sample::Sample,
    store::{Stamp, Store, StoreError},
    units::{Limit, Span},
};

/// The source of chats that became samples.
const SOURCE: &str = "serve";

/// See the module.
#[derive(Debug)]
pub struct Home {
    directory: PathBuf,
    key: KeyPlace,
    disk_max: Limit,
    /// How long samples are kept.
    kept_for: Option<Span>,
    /// For what can be seen without the key.
    look: Store,
    /// The personal adapter at the start.
    personal: Option<Stamp>,
}

impl Home {
    /// This directory, in which no more may lie, and no longer, than the policy says. To be opened before the personal
    /// adapter is read.
    pub fn open(directory: &Path, key: KeyPlace, policy: &Policy) -> Result<Self, StoreError> {
        let look = Store::open_shared_with(directory, key.clone())?;
        let personal = personal::stamp(&look)?;
        let (disk_max, kept_for) = (policy.budget.disk, policy.store.keep);
        Ok(Self { directory: directory.to_owned(), key, disk_max, kept_for, look, personal })
    }

    /// What tells the time before a `forget --all` from the time after it.
    pub(super) fn era(&self) -> Result<Era, StoreError> {
        Era::now(&self.look)
    }

    /// Whether the personal adapter is still there as it was at the start.
    fn has_personal(&self) -> bool {
        personal::stamp(&self.look).is_ok_and(|stamp| stamp == self.personal)
    }

    /// Keeps chats as `add` keeps conversations, unless everything was forgotten since they were said: `None` then.
    pub(super) fn keep(&self, samples: &[Sample], era: Era) -> Result<Option<usize>, StoreError> {
        let good = samples.iter().cloned().enumerate().collect();
        era::keep(
            &self.store()?.within(self.disk_max),
            era,
            &Parsed { good, bad: Vec::new() },
            SOURCE,
            Clock::system().unix_ms(),
        )
    }

    /// Forgets what is past its time, where no daemon does; tells whether it could look.
    pub(super) fn expire(&self) -> Result<bool, StoreError> {
        forget::expire_alone(&self.store()?, self.kept_for, Clock::system().unix_ms())
    }

    fn store(&self) -> Result<Store, StoreError> {
        Store::open_shared_with(&self.directory, self.key.clone())
    }
}

/// Whether the personal adapter has gone: forgotten, or trained again. Once it has, it stays away until the next start.
#[derive(Debug)]
pub(super) struct Gone(watch::Sender<bool>);

impl Gone {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Looks whether it has.
    pub(super) fn look(&self, home: &Home) -> bool {
        if !*self.0.borrow() && !home.has_personal() {
            self.0.send_replace(true);
            tracing::info!("the personal adapter was forgotten or trained again, and is served no more");
        }
        *self.0.borrow()
    }

    /// What comes of an answer with the personal adapter, which ends where it stands once it is known to have gone.
    pub(super) async fn or<T, E: From<Refusal>>(
        &self,
        answer: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut gone = self.0.subscribe();
        tokio::select! {
            biased;
            _ = gone.wait_for(|gone| *gone) => Err(Refusal::personal_gone().into()),
            answered = answer => answered,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{forget, keys};

    fn home(directory: &Path) -> Home {
        Home::open(directory, KeyPlace::File(directory.join(keys::FILE)), &Policy::default()).unwrap()
    }

    #[tokio::test]
    async fn an_answer_ends_once_the_personal_adapter_is_known_to_have_gone() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let sample = Sample::from_pair("p".into(), "r".into()).unwrap();
        store.write("personal.adapter", b"computed").unwrap();
        let (home, gone) = (home(directory.path()), Gone::new());
        assert!(!gone.look(&home));
        assert_eq!(gone.or(async { Ok::<_, Refusal>(5) }).await, Ok(5));
        let endless = std::future::pending::<Result<u8, Refusal>>();
        let (answered, ()) = tokio::join!(gone.or(endless), async {
            forget::wish(&store, &BTreeSet::from([sample.id()])).unwrap();
            assert!(forget::carry_out(&store).unwrap().personal);
            assert!(gone.look(&home));
        });
        assert_eq!(answered, Err(Refusal::personal_gone()));
        // Another one in its place is not what was opened.
        store.write("personal.adapter", b"computed").unwrap();
        assert!(gone.look(&home) && gone.or(async { Ok::<_, Refusal>(5) }).await.is_err());
        assert!(!home.has_personal());
    }

    #[test]
    fn the_key_goes_and_chats_of_later_are_kept_under_another() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path()).unwrap());
        let home = home(directory.path());
        let chat = |text: &str| [Sample::from_pair(text.into(), "r".into()).unwrap()];
        assert_eq!(home.keep(&chat("a"), home.era().unwrap()).unwrap(), Some(1));
        let before = home.era().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        forget::wish_all(&store).unwrap();
        forget::carry_out(&store).unwrap();
        assert!(store.unseal().unwrap());
        drop(store);
        assert_eq!(home.keep(&chat("b"), before).unwrap(), None);
        assert_eq!(home.keep(&chat("c"), home.era().unwrap()).unwrap(), Some(1));
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(crate::kept::samples(&store).unwrap(), chat("c"));
    }
}
