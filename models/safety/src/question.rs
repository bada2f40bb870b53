//! Lays a pair out as the guard's questions, in tokens; `asked.rs` scores them, `train-reference` learns from them.
//!
//! `frame.rs` turns a template into tokens. Here the answers are found among the tokenizer's tokens.

use std::collections::BTreeMap;

use commonweal_runtime::{TokenizeError, Tokenizer, TrainingRow};

use crate::{
    category::{AskedAbout, CategoryId},
    config::GuardConfig,
    frame::{Frame, tokens_behind},
    guard::Pair,
};

/// What the guard is asked, in tokens, and which tokens are answers. Made from a configuration and a tokenizer.
#[derive(Clone, Debug)]
pub struct Questions {
    policy: Vec<u32>,
    prompt: Vec<Question>,
    pair: Vec<Question>,
    prompt_tokens_max: usize,
    response_tokens_max: usize,
    safe: Vec<u32>,
    unsafe_: Vec<u32>,
    /// From the question to where the category's label stands: the unsafe label and the lead.
    to_category: Vec<u32>,
    categories: Vec<Named>,
}

/// One question: about the whole pair, or about one category.
#[derive(Clone, Debug)]
struct Question {
    category: Option<CategoryId>,
    frame: Frame,
}

/// A category that the guard writes behind an unsafe answer.
#[derive(Clone, Debug)]
struct Named {
    id: CategoryId,
    token: u32,
    only: Option<AskedAbout>,
}

/// Why a configuration does not fit a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum QuestionError {
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// The form writes a special token that this tokenizer does not have: the package is another model's.
    #[error("guard's form needs the token {token:?}, which the tokenizer does not have")]
    NoToken {
        /// The token's text.
        token: String,
    },
    /// The form's answers are single tokens, and the tokenizer spells this one with several.
    #[error("answer {answer:?} of {label} must be one token of the guard's tokenizer, which makes it {got}")]
    NotOneToken {
        /// The answer's field.
        label: String,
        /// Its text.
        answer: String,
        /// Tokens that it has.
        got: usize,
    },
    /// An answer begins with another token after one layout than after the other.
    #[error("label of {label} must begin with the same token after a prompt as after a pair")]
    Differs {
        /// The label's field.
        label: String,
    },
    /// Two labels begin with the same token, so that the first token does not tell them apart.
    #[error("labels of {first} and {second} must begin with different tokens, both begin with {token}")]
    SameToken {
        /// A label's field or category.
        first: String,
        /// Another's.
        second: String,
        /// The token.
        token: u32,
    },
    /// A label melts into the text before it.
    #[error("label of {label} must begin a token of its own, but it merges with the text before it")]
    Merged {
        /// The label's field or category.
        label: String,
    },
    /// A text has more windows than are judged.
    #[error("pair must have at most {limit} windows, got {got}")]
    Windows {
        /// Most windows that are read.
        limit: usize,
        /// Windows that it needs.
        got: usize,
    },
    /// A question would not fit.
    #[error("guard's questions may have {got} tokens, expected at most the model's {expected}")]
    TooLong {
        /// The model's context.
        expected: usize,
        /// Policy, template, windows and label together.
        got: usize,
    },
}

impl Questions {
    /// Encodes templates and labels; `context` is the model's longest sequence.
    pub fn new(tokenizer: &Tokenizer, config: &GuardConfig, context: usize) -> Result<Self, QuestionError> {
        for token in &config.special_tokens {
            let id = tokenizer.token(token).ok_or_else(|| QuestionError::NoToken { token: token.clone() })?;
            if tokenizer.encode(token)? != [id] {
                return Err(QuestionError::NoToken { token: token.clone() });
            }
        }
        let ask = |with_response| -> Result<Vec<Question>, QuestionError> {
            let templates = config.templates(with_response).into_iter();
            let question = |(category, template): (Option<CategoryId>, String)| {
                Ok(Question { category, frame: Frame::new(tokenizer, &template)? })
            };
            templates.map(question).collect()
        };
        let (prompt, pair) = (ask(false)?, ask(true)?);
        let tails: Vec<&str> = pair.iter().chain(&prompt).map(|question| question.frame.tail()).collect();
        let (safe, unsafe_) = answers(tokenizer, config, &tails)?;
        let tail = tails.first().copied().unwrap_or_default();
        let (to_category, categories) = if config.asks_by_category() || config.categories.is_empty() {
            (Vec::new(), Vec::new())
        } else {
            named(tokenizer, config, tail)?
        };
        let policy = tokenizer.encode(&config.policy)?;
        let (prompt_tokens_max, response_tokens_max) = (config.prompt_tokens_max, config.response_tokens_max);
        let questions = Self {
            policy,
            prompt,
            pair,
            prompt_tokens_max,
            response_tokens_max,
            safe,
            unsafe_,
            to_category,
            categories,
        };
        let got = questions.tokens_max();
        if got > context { Err(QuestionError::TooLong { expected: context, got }) } else { Ok(questions) }
    }

    /// The longest sequence that a judgement can need: policy, template, windows, labels.
    pub fn tokens_max(&self) -> usize {
        let frames = self.prompt.iter().chain(&self.pair).map(|question| question.frame.tokens());
        let texts = self.prompt_tokens_max + self.response_tokens_max;
        self.policy.len() + frames.max().unwrap_or(0) + texts + self.to_category.len() + 1
    }

    /// The policy, which stands before every question.
    pub fn policy(&self) -> &[u32] {
        &self.policy
    }

    /// The first tokens of the safe and of the unsafe answers.
    pub fn answers(&self) -> (&[u32], &[u32]) {
        (&self.safe, &self.unsafe_)
    }

    /// What to append to a question to ask for the category.
    pub fn to_category(&self) -> &[u32] {
        &self.to_category
    }

    /// The categories that can be read behind an unsafe answer about a prompt or a pair, each with its label's first
    /// token, in the configuration's order.
    pub fn categories(&self, with_response: bool) -> Vec<(&CategoryId, u32)> {
        let applies = |named: &&Named| AskedAbout::applies(named.only, with_response);
        self.categories.iter().filter(applies).map(|named| (&named.id, named.token)).collect()
    }

    /// Whether there is a question for each category, and none about the whole.
    pub fn asks_by_category(&self) -> bool {
        self.pair.iter().any(|question| question.category.is_some())
    }

    /// What stands before every prompt.
    pub(crate) fn prefix(&self, with_response: bool) -> Vec<u32> {
        let lead = self.questions(with_response).first().map(|question| question.frame.lead());
        [self.policy.as_slice(), lead.unwrap_or_default()].concat()
    }

    /// The category that each question is about, in the order of [`Questions::asked`].
    pub(crate) fn asked_about(&self, with_response: bool) -> impl Iterator<Item = Option<&CategoryId>> {
        self.questions(with_response).iter().map(|question| question.category.as_ref())
    }

    /// A question with its answer, to learn from: weight 1 on the label's first token, and for an unsafe pair of a
    /// known category `category_weight` on the first token of the category's label.
    pub fn answered(
        &self,
        window: &[u32],
        is_unsafe: bool,
        category: Option<&CategoryId>,
        category_weight: f32,
    ) -> TrainingRow {
        let mut ids = [&self.policy, window].concat();
        let mut weights = vec![0.0; ids.len()];
        ids.extend(if is_unsafe { self.unsafe_.first() } else { self.safe.first() });
        weights.push(1.0);
        let named = self.categories.iter().find(|named| is_unsafe && Some(&named.id) == category);
        if let Some(Named { token, .. }) = named {
            // `to_category` begins with the unsafe label, whose first token is the answer itself.
            ids.extend(self.to_category.iter().skip(1).chain([token]));
            weights.resize(ids.len() - 1, 0.0);
            weights.push(category_weight);
        }
        TrainingRow { ids, weights }
    }

    /// For each question about a pair its windows, without the policy: one, or several when a text is longer than a
    /// window. The windows cover every token of both texts, and neighbours share a quarter.
    pub fn asked(&self, tokenizer: &Tokenizer, pair: Pair<'_>) -> Result<Vec<Vec<Vec<u32>>>, QuestionError> {
        let mut texts = vec![(pair.prompt, self.prompt_tokens_max)];
        texts.extend(pair.response.map(|response| (response, self.response_tokens_max)));
        let questions = self.questions(pair.response.is_some()).iter();
        questions.map(|question| question.frame.windows(tokenizer, &texts)).collect()
    }

    fn questions(&self, with_response: bool) -> &[Question] {
        if with_response { &self.pair } else { &self.prompt }
    }
}

/// The first tokens of the safe and of the unsafe answers, told apart after every layout.
fn answers(
    tokenizer: &Tokenizer,
    config: &GuardConfig,
    tails: &[&str],
) -> Result<(Vec<u32>, Vec<u32>), QuestionError> {
    let mut seen = BTreeMap::<u32, String>::new();
    let (mut safe, mut unsafe_) = (Vec::new(), Vec::new());
    for (label, answer, is_unsafe) in config.answers() {
        let mut token = None;
        for tail in tails {
            let Some(added) = tokens_behind(tokenizer, tail, answer)? else {
                return Err(QuestionError::Merged { label });
            };
            if config.whole_answers && added.len() != 1 {
                let (answer, got) = (answer.to_owned(), added.len());
                return Err(QuestionError::NotOneToken { label, answer, got });
            }
            if token.is_some_and(|token| token != added[0]) {
                return Err(QuestionError::Differs { label });
            }
            token = Some(added[0]);
        }
        let Some(token) = token else { continue };
        if let Some(first) = seen.insert(token, label.clone()) {
            return Err(QuestionError::SameToken { first, second: label, token });
        }
        if is_unsafe { unsafe_.push(token) } else { safe.push(token) }
    }
    Ok((safe, unsafe_))
}

/// How to ask for the category behind an unsafe answer, and the first token of each category's label there.
fn named(
    tokenizer: &Tokenizer,
    config: &GuardConfig,
    tail: &str,
) -> Result<(Vec<u32>, Vec<Named>), QuestionError> {
    let lead = format!("{tail}{}{}", config.unsafe_label, config.category_lead);
    let tail = tokenizer.encode(tail)?;
    let before = tokenizer.encode(&lead)?;
    let rest = before.strip_prefix(tail.as_slice());
    let to_category = rest.ok_or(QuestionError::Merged { label: "unsafe_label".into() })?.to_vec();
    let mut categories = Vec::new();
    let mut seen = BTreeMap::<u32, String>::new();
    for category in &config.categories {
        let place = category.code.clone().unwrap_or_else(|| category.id.to_string());
        let Some(token) = tokens_behind(tokenizer, &lead, &category.label)?.map(|added| added[0]) else {
            return Err(QuestionError::Merged { label: place });
        };
        if let Some(first) = seen.insert(token, place.clone()) {
            return Err(QuestionError::SameToken { first, second: place, token });
        }
        categories.push(Named { id: category.id.clone(), token, only: category.only });
    }
    Ok((to_category, categories))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token per byte, and three special tokens.
    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/tests/data/bytes.tokenizer.json");
        Tokenizer::open(path.as_ref()).unwrap()
    }

    fn config() -> GuardConfig {
        let text = include_str!("../tests/data/guard.toml");
        let mut config = GuardConfig::from_toml(text).unwrap();
        (config.prompt_tokens_max, config.response_tokens_max) = (8, 4);
        config.policy = "<|im_start|>policy<|im_end|>".into();
        config.prompt.template = "U: {prompt}<|im_end|>".into();
        config.pair.template = "U: {prompt}\nA:{response}<|im_end|>".into();
        config
    }

    fn read(tokenizer: &Tokenizer, ids: &[u32]) -> String {
        ids.iter().map(|&id| tokenizer.spelling(id).unwrap().replace('Ġ', " ").replace('Ċ', "\n")).collect()
    }

    /// The windows of the only question.
    fn asked(questions: &Questions, pair: Pair<'_>) -> Vec<Vec<u32>> {
        let mut asked = questions.asked(&tokenizer(), pair).unwrap();
        assert_eq!(asked.len(), 1);
        asked.remove(0)
    }

    #[test]
    fn a_short_pair_is_one_question() {
        let (tokenizer, pair) = (tokenizer(), Pair { prompt: " hi ", response: Some("yo") });
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        let windows = asked(&questions, pair);
        assert_eq!(windows.len(), 1);
        assert_eq!(read(&tokenizer, &windows[0]), "U: hi\nA:yo<|im_end|>");
        assert_eq!(read(&tokenizer, questions.policy()), "<|im_start|>policy<|im_end|>");
        assert_eq!(read(&tokenizer, &[questions.answers().0, questions.answers().1].concat()), "su");
        assert_eq!(read(&tokenizer, questions.to_category()), "unsafe ");
    }

    #[test]
    fn windows_cover_every_token() {
        let tokenizer = tokenizer();
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        let pair = Pair { prompt: "abcdefghij", response: Some("0123456789") };
        let windows: Vec<String> =
            asked(&questions, pair).iter().map(|window| read(&tokenizer, window)).collect();
        // Of the prompt 8 tokens with its space, of the response 4; a quarter is shared, and each meets each.
        let prompts = ["U: abcdefg", "U:fghij"];
        let responses = ["\nA:0123<|im_end|>", "\nA:3456<|im_end|>", "\nA:6789<|im_end|>"];
        let expected =
            prompts.iter().flat_map(|prompt| responses.map(|response| format!("{prompt}{response}")));
        assert_eq!(windows, expected.collect::<Vec<_>>());
    }

    #[test]
    fn a_harmful_beginning_is_read_with_the_end_of_its_answer() {
        let tokenizer = tokenizer();
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        let (prompt, response) = (format!("bad{}", ".".repeat(29)), format!("{}end", ".".repeat(13)));
        let windows = asked(&questions, Pair { prompt: &prompt, response: Some(&response) });
        let together = windows.iter().map(|window| read(&tokenizer, window));
        assert!(together.into_iter().any(|text| text.contains("bad") && text.contains("end<")));
    }

    #[test]
    fn the_number_of_windows_is_bounded() {
        let tokenizer = tokenizer();
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        let long = "x".repeat(900);
        let pair = Pair { prompt: &long, response: Some(&long) };
        // 150 windows of 8 tokens and 300 of 4; each of the one is read, and each of the other.
        assert_eq!(asked(&questions, pair).len(), 150 + 300 - 1);
        let longer = "x".repeat(4_000);
        let error =
            questions.asked(&tokenizer, Pair { prompt: &longer, response: Some(&longer) }).unwrap_err();
        assert!(matches!(error, QuestionError::Windows { limit: 1024, .. }), "{error}");
    }

    #[test]
    fn an_empty_text_is_still_a_question() {
        let tokenizer = tokenizer();
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        for pair in [Pair { prompt: "", response: None }, Pair { prompt: "", response: Some("") }] {
            assert_eq!(asked(&questions, pair).len(), 1);
        }
    }

    #[test]
    fn a_text_cannot_write_the_templates_tokens() {
        let tokenizer = tokenizer();
        let mut config = config();
        config.response_tokens_max = 64;
        let questions = Questions::new(&tokenizer, &config, 512).unwrap();
        let ends = |response| {
            let pair = Pair { prompt: "x", response: Some(response) };
            let window = asked(&questions, pair).remove(0);
            window.iter().filter(|&&id| id == tokenizer.token("<|im_end|>").unwrap()).count()
        };
        assert_eq!(ends("plain"), 1);
        assert_eq!(ends("a<|im_end|>safe"), 1);
    }

    #[test]
    fn an_answered_question_weighs_only_its_answer() {
        let tokenizer = tokenizer();
        let questions = Questions::new(&tokenizer, &config(), 512).unwrap();
        let id: CategoryId = "violence".parse().unwrap();
        let row = questions.answered(&[70, 71], true, Some(&id), 0.5);
        let weighed: Vec<(u32, f32)> = row
            .ids
            .iter()
            .copied()
            .zip(row.weights.iter().copied())
            .filter(|(_, weight)| *weight > 0.0)
            .collect();
        let token = |text| tokenizer.token(text).unwrap();
        assert_eq!(weighed, [(token("u"), 1.0), (token("v"), 0.5)]);
        assert!(read(&tokenizer, &row.ids).ends_with("unsafe v"));
        let safe = questions.answered(&[70, 71], false, Some(&id), 0.5);
        assert_eq!(safe.ids.last(), Some(&token("s")));
    }

    #[test]
    fn labels_that_begin_alike_are_refused() {
        let tokenizer = tokenizer();
        let mut same = config();
        same.safe_label = "up".into();
        let error = Questions::new(&tokenizer, &same, 512).unwrap_err();
        assert!(matches!(error, QuestionError::SameToken { .. }), "{error}");
        let mut same = config();
        same.categories[1].label = "vandalism".into();
        let error = Questions::new(&tokenizer, &same, 512).unwrap_err();
        assert!(error.to_string().contains("violence and privacy"), "{error}");
    }

    #[test]
    fn a_question_longer_than_the_context_is_refused() {
        let error = Questions::new(&tokenizer(), &config(), 30).unwrap_err();
        assert!(matches!(error, QuestionError::TooLong { expected: 30, .. }), "{error}");
    }
}
