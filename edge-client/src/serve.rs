//! The local endpoint: an OpenAI-compatible server for the installed model, on this machine. `cli/serve.rs` opens what it
//! needs and starts it.
//!
//! A connection (`serve/listen.rs`) passes the door (`door.rs`) and is routed (`routes.rs`). A request becomes a checked
//! wish (`requests.rs`), joins the batch of the thread that answers (`batch.rs`), and is followed (`follow.rs`) until it
//! is an answer in OpenAI's form (`answers.rs`) or a refusal (`refusals.rs`). The guard judges on request, and around
//! answers if the policy says so (`moderate.rs`). What is said is forgotten, but for chats whose owner agreed to keep them
//! (`keep.rs`).

mod refusals;
mod fields;
mod requests;
mod answers;
mod door;
mod listen;
mod batch;
mod follow;
mod moderate;
mod keep;
mod routes;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use commonweal_runtime::{Message, Model, PreparedAdapter};
use commonweal_safety::{Constitution, Guard};
use tokio::{net::TcpListener, runtime::Handle, sync::mpsc};

use crate::{policy::Guarding, sample::Sample};
use batch::{End, Job};
use keep::Conversations;
use moderate::Moderator;
use refusals::Refusal;

pub(crate) use answers::finish_reason;
pub use door::Key;
pub use keep::Consent;

/// Prompts that wait for the batch; a further one is told to come back.
const WAITING_MAX: usize = 32;
/// How often it is looked which conversations are over.
const KEEP_LOOK: Duration = Duration::from_secs(30);

/// A model that requests can name: an adapter over the base.
#[derive(Clone, Debug)]
pub struct Voice {
    /// Its name.
    pub name: String,
    /// What it says things with.
    pub adapter: PreparedAdapter,
}

/// Keeps samples; says how it went to nobody but the log.
pub type Keep = Box<dyn Fn(Vec<Sample>) + Send + Sync>;

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
    /// Keeps them.
    pub keep: Keep,
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
    keep: Keep,
    conversations: Mutex<Conversations>,
    jobs: mpsc::Sender<Job>,
    fingerprint: String,
}

impl Served {
    /// The adapter of a model's name.
    fn voice(&self, name: Option<&str>) -> Result<usize, Refusal> {
        let Some(name) = name else { return Ok(0) };
        self.voices.iter().position(|voice| voice.name == name).ok_or_else(|| {
            let served: Vec<&str> = self.voices.iter().map(|voice| voice.name.as_str()).collect();
            Refusal::no_model(name, &served)
        })
    }

    fn guards_answers(&self) -> bool {
        self.guarding == Guarding::Refuse
    }

    #[expect(clippy::unused_self, reason = "identifiers are the endpoint's to give")]
    fn identifier(&self, prefix: &str) -> String {
        format!("{prefix}-{:032x}", rand::random::<u128>())
    }

    /// Holds a conversation until it is over.
    fn hear(self: &Arc<Self>, asked: &[Message], answer: &str) {
        let over = self.open().hear(asked, answer, Instant::now());
        self.keep_apart(over.into_iter().collect());
    }

    fn open(&self) -> std::sync::MutexGuard<'_, Conversations> {
        self.conversations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps samples where writing may take its time.
    fn keep_apart(self: &Arc<Self>, samples: Vec<Sample>) {
        if !samples.is_empty() {
            let served = Arc::clone(self);
            tokio::task::spawn_blocking(move || (served.keep)(samples));
        }
    }
}

/// Answers on a socket until `stop` is done.
pub async fn serve(
    offer: Offer,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let Offer { model, voices, guard, constitution, guarding, consent, keep, key, fingerprint } = offer;
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
    let conversations = Mutex::default();
    let served = Arc::new(Served {
        model,
        voices,
        moderator,
        guarding,
        consent,
        keep,
        conversations,
        jobs,
        fingerprint,
    });
    let looking = tokio::spawn(look(Arc::clone(&served)));
    let app = door::guarded(routes::routes(Arc::clone(&served)), address.ip(), key);
    listen::listen(listener, app, stop).await;
    looking.abort();
    end.now();
    let rest = served.open().all();
    tokio::task::spawn_blocking(move || {
        if !rest.is_empty() {
            (served.keep)(rest);
        }
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
        let over = served.open().over(Instant::now());
        served.keep_apart(over);
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
