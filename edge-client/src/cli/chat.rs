//! `chat`: talks to the installed model, on this device only. What is said stays in memory; it is written where `/save`
//! says so, and nowhere else. `chat/reader.rs` reads what is typed, `chat/commands.rs` says what it means.

pub(super) mod commands;
mod reader;

use std::{
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, bail};
use commonweal_runtime::{Cancel, GenerateOptions, InferError, Message, Model, PreparedAdapter};
use serde_json::json;

use super::{Shared, exit::BadInput, open, voices::Voices};
use crate::{
    events::Output,
    personal,
    serve::finish_reason,
    store::{Stamp, Store},
};
use commands::{HELP, Typed, meaning};
use reader::Reader;

/// What `chat` was asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Request {
    /// Answer this and end, instead of reading from the terminal or a pipe
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Instructions for the model
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// With the personal adapter beside the release
    #[arg(long)]
    personal: bool,
    /// 0 always takes the most probable word
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = super::at_least_one())]
    max_tokens: usize,
    /// Remember what you type in this file, for the arrow keys; without it, only until the end
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

/// A conversation under way.
struct Talk {
    model: Model,
    adapter: PreparedAdapter,
    options: GenerateOptions,
    system: Option<String>,
    said: Vec<Message>,
    output: Output,
    /// The personal adapter as it was read, if it speaks here, and where.
    personal: Option<(Store, Option<Stamp>)>,
    /// The answer under way.
    answering: Arc<Mutex<Cancel>>,
}

pub(super) fn chat(shared: &Shared, request: &Request) -> Result<()> {
    if !(request.temperature.is_finite() && request.temperature >= 0.0) {
        return Err(BadInput("--temperature: expected a number of at least 0".into()).into());
    }
    let place = open::Place::find(shared)?;
    let model = open::open_model(shared, &place)?;
    let store = place.look()?;
    let stamp = personal::stamp(&store)?;
    let voices = Voices::find(&model, &store)?;
    let voice = voices.one(&model, request.personal)?;
    let options = GenerateOptions {
        max_new_tokens: request.max_tokens,
        temperature: request.temperature,
        top_p: 0.9,
        seed: rand::random(),
        ..Default::default()
    };
    let mut talk = Talk {
        model,
        adapter: voice.adapter,
        options,
        system: request.system.clone(),
        said: Vec::new(),
        output: shared.output(),
        personal: request.personal.then_some((place.look()?, stamp)),
        answering: Arc::default(),
    };
    if let Some(prompt) = &request.prompt {
        return talk.say(prompt);
    }
    let mut reader = Reader::open(request.history.as_deref())?;
    tracing::info!("{}; /help tells what can be typed", voice.name);
    let _signals = if reader.is_terminal() { Some(talk.stop_answers_on_ctrl_c()?) } else { None };
    while let Some(text) = reader.next()? {
        match meaning(&text) {
            Typed::Words(text) => {
                if let Err(error) = talk.say(&text) {
                    tracing::warn!("no answer: {error:#}");
                }
            }
            Typed::Reset => {
                talk.said.clear();
                tracing::info!("forgotten");
            }
            Typed::System(system) => talk.system = system,
            Typed::Save(path) => match talk.save(&path) {
                Ok(()) => tracing::info!("saved to {}", path.display()),
                Err(error) => tracing::warn!("not saved: {error:#}"),
            },
            Typed::Help => tracing::info!("what can be typed:\n{HELP}"),
            Typed::Quit => break,
            Typed::Wrong(why) => tracing::warn!("{why}"),
        }
    }
    Ok(())
}

impl Talk {
    /// Says something and shows the answer. What got no answer is forgotten; what was shown of one that was stopped is
    /// not.
    fn say(&mut self, text: &str) -> Result<()> {
        self.said.push(Message::user(text));
        let answered = self.answer();
        if !matches!(answered, Ok(true)) {
            self.said.pop();
        }
        answered.map(|_| ())
    }

    /// Whether there was an answer.
    fn answer(&mut self) -> Result<bool> {
        if let Some((store, stamp)) = &self.personal
            && personal::stamp(store)? != *stamp
        {
            bail!("the personal adapter was forgotten or trained again since this chat began: begin another");
        }
        let cancel = Cancel::new();
        *self.answering.lock().unwrap_or_else(PoisonError::into_inner) = cancel.clone();
        let prompt = self.prompt()?;
        let mut shown = String::new();
        let is_text = self.output == Output::Text;
        let mut show = |_: usize, piece: &str| {
            shown.push_str(piece);
            if is_text {
                let mut out = std::io::stdout().lock();
                let _ = write!(out, "{piece}").and_then(|()| out.flush());
            }
        };
        let answers =
            self.model.generate_streaming(&self.adapter, None, &[prompt], &self.options, &mut show, &cancel);
        let (tokens, reason) = match answers {
            Ok(mut answers) => {
                let Some(answer) = answers.pop() else { bail!("the model gave no answer") };
                (Some(answer.tokens.len()), finish_reason(answer.stop))
            }
            Err(InferError::Cancelled) => (None, "stopped"),
            Err(error) => return Err(error.into()),
        };
        match self.output {
            Output::Text => self.output.say(""),
            Output::Json => self.output.say(&json!({
                "role": "assistant", "content": shown, "tokens": tokens, "finish_reason": reason,
            })),
        }
        // Each answer draws other random numbers.
        self.options.seed = self.options.seed.wrapping_add(1);
        let is_answer = !shown.is_empty() || tokens.is_some();
        if is_answer {
            self.said.push(Message::assistant(shown));
        }
        Ok(is_answer)
    }

    /// The conversation as tokens; the oldest exchanges make room for the answer.
    fn prompt(&mut self) -> Result<commonweal_runtime::Prompt> {
        loop {
            let messages: Vec<Message> = self.messages();
            let prompt = self.model.chat().prompt(&messages)?;
            let fits = prompt.ids.len() + self.options.max_new_tokens <= self.model.context();
            if fits || self.said.len() <= 2 {
                return Ok(prompt);
            }
            self.said.drain(..2);
        }
    }

    fn messages(&self) -> Vec<Message> {
        self.system.iter().map(Message::system).chain(self.said.iter().cloned()).collect()
    }

    /// Writes the conversation to a file that is not there yet, for its owner only.
    fn save(&self, path: &Path) -> Result<()> {
        if self.said.is_empty() {
            bail!("nothing was said yet");
        }
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).with_context(|| path.display().to_string())?;
        let line = json!({ "messages": self.messages() });
        writeln!(file, "{line}").and_then(|()| file.sync_all()).with_context(|| path.display().to_string())
    }

    /// From here on, Ctrl-C ends the answer under way, and never the program. The runtime must be held.
    fn stop_answers_on_ctrl_c(&self) -> Result<tokio::runtime::Runtime> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        // Before the line editor begins: it puts its own handler in the place of what it finds, and afterwards that back.
        let mut interrupts = {
            let _context = runtime.enter();
            #[cfg(unix)]
            let interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
            #[cfg(windows)]
            let interrupts = tokio::signal::windows::ctrl_c()?;
            interrupts
        };
        let answering = Arc::clone(&self.answering);
        runtime.spawn(async move {
            while interrupts.recv().await.is_some() {
                answering.lock().unwrap_or_else(PoisonError::into_inner).cancel();
            }
        });
        Ok(runtime)
    }
}
