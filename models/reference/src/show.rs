//! What people and scripts see while a command runs: a bar on stderr, or one JSON object a line on stdout.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

/// Where progress goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    json: bool,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// One line for scripts, or a short note for people.
    pub(crate) fn event(self, value: &Value) {
        if self.json {
            println!("{value}");
        } else {
            eprintln!("{}", describe(value));
        }
    }

    /// A training step: only scripts want every one of them; people see the bar.
    pub(crate) fn step(self, value: &Value) {
        if self.json {
            println!("{value}");
        }
    }

    pub(crate) fn bar(self, steps: u64, done: u64) -> ProgressBar {
        let target = if self.json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(steps), target).with_position(done);
        let template = "{bar:30} step {pos}/{len}, {elapsed} of about {duration}, {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        bar
    }
}

fn describe(value: &Value) -> String {
    let Value::Object(fields) = value else { return value.to_string() };
    let shown: Vec<String> = fields
        .iter()
        .filter(|(key, _)| *key != "event")
        .map(|(key, value)| format!("{key} {value}"))
        .collect();
    let name = fields.get("event").and_then(Value::as_str).unwrap_or("note");
    format!("{name}: {}", shown.join(", "))
}
