//! `chat`: talks to the installed model, on this device only.

use std::io::{BufRead, Write};

use anyhow::Result;
use commonweal_runtime::{Cancel, GenerateOptions, Message, PreparedAdapter};
use serde_json::json;

use super::{Shared, identity::Identity, open, serve::finish_reason};
use crate::{
    events::Output,
    install::{self, Expected},
};

pub(super) fn chat(
    shared: &Shared,
    prompt: Option<String>,
    temperature: f32,
    max_tokens: usize,
) -> Result<()> {
    let place = open::Place::find(shared)?;
    let model = open::open_model(shared, &place)?;
    let store = place.look()?;
    let adapter = match Identity::read(&store)? {
        None => None,
        Some(Identity { credentials, .. }) => {
            let base = crate::pipeline::base_of(&model);
            let expected = Expected { key: *credentials.signing_key(), base, layout: model.layout().clone() };
            install::installed(&store, &expected)?
        }
    };
    let release = adapter.as_ref().map_or("no release installed: this is the base".to_owned(), |installed| {
        format!("release {}", installed.version.0)
    });
    tracing::info!("{release}; end with Ctrl-D");
    let prepared = model.prepare(adapter.as_ref().map(|installed| &installed.adapter))?;
    let options =
        GenerateOptions { max_new_tokens: max_tokens, temperature, top_p: 0.9, ..Default::default() };
    let mut history = Vec::new();
    if let Some(prompt) = prompt {
        history.push(Message::user(prompt));
        return answer(&model, &prepared, &mut history, &options, shared.output());
    }
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if !line.trim().is_empty() {
            history.push(Message::user(line));
            if let Err(error) = answer(&model, &prepared, &mut history, &options, shared.output()) {
                // What was said before is worth keeping; the words that got no answer are not.
                history.pop();
                tracing::warn!("no answer: {error:#}");
            }
        }
    }
    Ok(())
}

fn answer(
    model: &commonweal_runtime::Model,
    adapter: &PreparedAdapter,
    history: &mut Vec<Message>,
    options: &GenerateOptions,
    output: Output,
) -> Result<()> {
    // The oldest exchanges make room for the answer.
    let mut prompt = model.chat().prompt(history)?;
    while prompt.ids.len() + options.max_new_tokens > model.context() && history.len() > 2 {
        history.drain(..2);
        prompt = model.chat().prompt(history)?;
    }
    let mut show = |_: usize, piece: &str| {
        if output == Output::Text {
            let mut out = std::io::stdout().lock();
            let _ = write!(out, "{piece}").and_then(|()| out.flush());
        }
    };
    let answers = model.generate_streaming(adapter, None, &[prompt], options, &mut show, &Cancel::new())?;
    if let Some(answer) = answers.into_iter().next() {
        match output {
            Output::Text => output.say(""),
            Output::Json => output.say(&json!({
                "role": "assistant", "content": answer.text, "tokens": answer.tokens.len(),
                "finish_reason": finish_reason(answer.stop),
            })),
        }
        history.push(Message::assistant(answer.text));
    }
    Ok(())
}
