//! `serve`: opens the model, the guard and the adapters, and starts the endpoint (`crate::serve`) on this machine.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use commonweal_runtime::Cancel;

use super::{Shared, exit::BadInput, open, voices::Voices};
use crate::{
    events::Event,
    serve::{self, Consent, Home, Key, Offer},
};

/// How often a signal to stop is looked for.
const STOP_LOOK: Duration = Duration::from_millis(100);
/// A key that can be guessed is none.
const KEY_BYTES_MIN: usize = 8;

/// What `serve` was asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Request {
    /// Where to listen; the loopback only, unless you say otherwise
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Requests must name this key (`Authorization: Bearer KEY`); better in the environment, where others cannot see it
    #[arg(long, env = "COMMONWEAL_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Chats become samples for training, if policy.toml allows it ([serve] keep_chats = true)
    #[arg(long)]
    keep_chats: bool,
}

pub(super) fn serve(shared: &Shared, request: &Request) -> Result<()> {
    let place = open::Place::find(shared)?;
    let policy = place.policy(shared)?;
    let consent = Consent { policy: policy.serve.keep_chats, all: request.keep_chats };
    check(request, consent)?;
    let stages = open::Stages::open(shared, &place, &policy, &Cancel::new())?;
    let home = Home::open(&place.directory, place.key.clone(), &policy)?;
    let voices = Voices::find(&stages.model, &place.look()?)?;
    let offer = Offer {
        voices: voices.all(&stages.model)?,
        fingerprint: voices.fingerprint(&stages.model),
        constitution: stages.reviser.constitution().clone(),
        guard: stages.guard,
        model: stages.model,
        guarding: policy.serve.guard,
        consent,
        home,
        key: request.api_key.as_deref().map(Key::new),
    };
    let models = offer.voices.iter().map(|voice| voice.name.clone()).collect();
    let (listen, output) = (request.listen, shared.output());
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}"))?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let (guard, chats) = (policy.serve.guard.name().into(), consent.words().into());
        output.show(&Event::Serving { url, models, guard, chats });
        let stopped = open::stop_on_signal(&tokio::runtime::Handle::current());
        let stop = async move {
            while !stopped.is_cancelled() {
                tokio::time::sleep(STOP_LOOK).await;
            }
        };
        serve::serve(offer, listener, stop).await.context("the endpoint failed")
    })
}

fn check(request: &Request, consent: Consent) -> Result<()> {
    if consent.all && !consent.policy {
        let text =
            "--keep-chats: expected the policy to allow it first: [serve] keep_chats = true in policy.toml";
        return Err(BadInput(text.into()).into());
    }
    if request.api_key.as_ref().is_some_and(|key| key.len() < KEY_BYTES_MIN) {
        let text = format!("--api-key: expected at least {KEY_BYTES_MIN} bytes");
        return Err(BadInput(text).into());
    }
    if request.api_key.is_none() && !request.listen.ip().is_loopback() {
        tracing::warn!(
            "{} can be reached from other machines, and no --api-key is asked for: whoever reaches it can use it",
            request.listen
        );
    }
    Ok(())
}
