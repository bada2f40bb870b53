//! A bar on stderr while `init` and `evaluate` measure, which takes seconds with a small model and minutes with a large
//! one. Where nobody watches there is none: indicatif draws on terminals only.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::evaluate::PARTS;

/// Moves on with each part that begins, and is gone when this is dropped.
pub(super) fn measuring() -> impl Fn(&'static str) {
    let bar = ProgressBar::new(PARTS).with_finish(ProgressFinish::AndClear);
    if let Ok(style) = ProgressStyle::with_template("measuring {bar:16} {pos}/{len} {msg}, {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    move |part| {
        bar.inc(1);
        bar.set_message(part);
    }
}
