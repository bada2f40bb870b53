//! Adds what the words of a text say to what a form finds: the logarithms of the odds of two witnesses add up where each
//! knows something of its own, and the calibration is fitted on the sum.
//!
//! Between a form (`asked.rs`, `classified.rs`) and `guard.rs`, which calibrates. Takes nothing from the form: every
//! text that it refuses is refused all the same.

use commonweal_runtime::Cancel;

use crate::{
    config::WordsUse,
    form::{Finding, Form, Near},
    guard::{GuardError, Pair},
    words::Words,
};

/// A form beside which words are heard.
#[derive(Debug)]
pub(crate) struct WithWords {
    pub(crate) form: Box<dyn Form>,
    pub(crate) words: Words,
    pub(crate) heard: WordsUse,
}

impl Form for WithWords {
    fn find(
        &self,
        pairs: &[Pair<'_>],
        near: Near<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Vec<Finding>>, GuardError> {
        let said = |pair: &Pair<'_>| self.heard.log_odds(self.words.say(*pair), pair.response.is_some());
        let said: Vec<f64> = pairs.iter().map(said).collect();
        let near = |index: usize, log_odds: f64| near(index, log_odds + said[index]);
        let mut found = self.form.find(pairs, &near, cancel)?;
        for (findings, said) in found.iter_mut().zip(said) {
            // Infinite log-odds of the form stay: words are finite.
            for finding in findings {
                finding.log_odds += said;
            }
        }
        Ok(found)
    }

    fn close_inference(&self) {
        self.form.close_inference();
    }

    fn close(&self) {
        self.form.close();
    }
}
