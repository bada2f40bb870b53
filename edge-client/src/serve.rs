//! The local endpoint: an OpenAI-compatible server for the installed model, on this machine. `cli/serve.rs` opens what it
//! needs and starts it.
//!
//! A connection (`serve/listen.rs`) passes the door (`door.rs`) and is routed (`routes.rs`). A request becomes a checked
//! wish (`requests.rs`), joins the batch of the thread that answers (`batch.rs`), and is followed (`follow.rs`) until it
//! is an answer in OpenAI's form (`answers.rs`) or a refusal (`refusals.rs`). The guard judges on request, and around
//! answers if the policy says so (`moderate.rs`). What is said is forgotten, but for chats whose owner agreed to keep them
//! (`keep.rs`, `keeping.rs`). `home.rs` writes those, and sees what the owner wants forgotten meanwhile.

mod refusals;
mod fields;
mod messages;
mod requests;
mod answers;
mod door;
mod listen;
mod batch;
mod follow;
mod moderate;
mod keep;
mod home;
mod keeping;
mod routes;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use commonweal_runtime::{Model, PreparedAdapter};
use commonweal_safety::{Constitution, Guard};
use tokio::{net::TcpListener, runtime::Handle, sync::mpsc};

use crate::policy::Guarding;
use batch::{End, Job};
use home::Gone;
use keeping::Keeping;
use moderate::Moderator;
use refusals::Refusal;

pub(crate) use answers::finish_reason;
pub use door::Key;
pub use home::Home;
pub use keep::Consent;

/// Prompts that wait for the batch; a further one is told to come back.
const WAITING_MAX: usize = 32;
/// How often it is looked which conversations are over, and what waits to be written is tried again.
const KEEP_LOOK: Duration = Duration::from_secs(30);
/// How often it is looked what was forgotten. Whatever begins looks for itself; this ends what is under way.
const FORGET_LOOK: Duration = Duration::from_millis(500);

/// A model that requests can name: an adapter over the base.
#[derive(Clone, Debug)]
pub struct Voice {
    /// Its name.
    pub name: String,
    /// What it says things with.
    pub adapter: PreparedAdapter,
    /// Whether that is with the personal adapter, and goes with it.
    pub is_personal: bool,
}

/// What is served, and how.
pub struct Offer {
    /// The base.
    pub model: Model,
    /// What requests can name; the first answers those that name none.
    pub voices: Vec<Voice>,
    /// The guard.
    pub guard: Guard,
    /// What is answered in the place of what is unsafe.
    pub constitution: Constitution,
    /// Whether the guard stands before and behind answers.
    pub guarding: Guarding,
    /// Whether chats become samples.
    pub consent: Consent,
    /// Where they are kept, and from where the voices came.
    pub home: Home,
    /// Requests must name it.
    pub key: Option<Key>,
    /// Tells answers of one state of the model from those of another.
    pub fingerprint: String,
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.voices.iter().map(|voice| voice.name.as_str()).collect();
        f.debug_struct("Offer")
            .field("voices", &names)
            .field("guarding", &self.guarding)
            .finish_non_exhaustive()
    }
}

/// What every request sees.
struct Served {
    model: Model,
    voices: Vec<Voice>,
    moderator: Moderator,
    guarding: Guarding,
    consent: Consent,
    keeping: Keeping,
    /// Whether the personal adapter has.
    gone: Gone,
    jobs: mpsc::Sender<Job>,
    fingerprint: String,
}

impl Served {
    /// The adapter of a model's name.
    fn voice(&self, name: Option<&str>) -> Result<usize, Refusal> {
        let Some(name) = name else { return Ok(0) };
        match self.voices.iter().position(|voice| voice.name == name) {
            Some(index) if self.is_gone(&self.voices[index]) => Err(Refusal::personal_gone()),
            Some(index) => Ok(index),
            None => Err(Refusal::no_model(name, &self.names())),
        }
    }

    /// What can be asked for now.
    fn names(&self) -> Vec<&str> {
        let there = self.voices.iter().filter(|voice| !self.is_gone(voice));
        there.map(|voice| voice.name.as_str()).collect()
    }

    fn is_gone(&self, voice: &Voice) -> bool {
        voice.is_personal && self.gone.look(&self.keeping.home)
    }

    /// What comes of an answer with this adapter, as long as that may be used.
    async fn allowed<T, E: From<Refusal>>(
        &self,
        adapter: usize,
        answer: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        if self.voices[adapter].is_personal { self.gone.or(answer).await } else { answer.await }
    }

    fn guards_answers(&self) -> bool {
        self.guarding == Guarding::Refuse
    }

    #[expect(clippy::unused_self, reason = "identifiers are the endpoint's to give")]
    fn identifier(&self, prefix: &str) -> String {
        format!("{prefix}-{:032x}", rand::random::<u128>())
    }
}

/// Answers on a socket until `stop` is done.
pub async fn serve(
    offer: Offer,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let Offer { model, voices, guard, constitution, guarding, consent, home, key, fingerprint } = offer;
    let (jobs, queue) = mpsc::channel(WAITING_MAX);
    let end = Arc::new(End::default());
    let answering = {
        let (model, end, handle) = (model.clone(), Arc::clone(&end), Handle::current());
        let adapters: Vec<PreparedAdapter> = voices.iter().map(|voice| voice.adapter.clone()).collect();
        std::thread::Builder::new()
            .name("answers".into())
            .spawn(move || batch::answer(&model, &adapters, queue, &end, &handle))?
    };
    let moderator = Moderator::new(guard, constitution);
    let served = Arc::new(Served {
        model,
        voices,
        moderator,
        guarding,
        consent,
        keeping: Keeping::new(home),
        gone: Gone::new(),
        jobs,
        fingerprint,
    });
    let looking = tokio::spawn(look(Arc::clone(&served)));
    let letting_go = tokio::spawn(let_go(Arc::clone(&served)));
    let app = door::guarded(routes::routes(Arc::clone(&served)), address.ip(), key);
    listen::listen(listener, app, stop).await;
    looking.abort();
    letting_go.abort();
    end.now();
    tokio::task::spawn_blocking(move || {
        served.keeping.end();
        let _ = answering.join();
    })
    .await
    .map_err(std::io::Error::other)
}

/// Keeps the conversations that are over, now and then.
async fn look(served: Arc<Served>) {
    let mut ticks = tokio::time::interval(KEEP_LOOK);
    loop {
        ticks.tick().await;
        let served = Arc::clone(&served);
        // Writing may take its time.
        let _ = tokio::task::spawn_blocking(move || served.keeping.tend(Instant::now())).await;
    }
}

/// Lets go of what was forgotten.
async fn let_go(served: Arc<Served>) {
    let mut ticks = tokio::time::interval(FORGET_LOOK);
    loop {
        ticks.tick().await;
        for voice in &served.voices {
            served.is_gone(voice);
        }
        served.keeping.let_go();
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
