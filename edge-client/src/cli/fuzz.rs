//! What must hold for anything at all that is given to a command (`../fuzz.rs`).

pub(crate) use super::identity::ADDRESS;
use super::{
    chat::commands::{Lines, Typed, meaning},
    evaluate::labelled,
    identity::Address,
};
use crate::{
    fuzz::{WORDS_MAX, check_rows, form_of},
    rows,
    store::Store,
};

/// A file of labelled rows, for `filter --evaluate`, gives rows or says shortly which line gives none.
pub fn evaluation_rows(bytes: &[u8]) {
    let Some((form, text)) = form_of(bytes) else { return };
    check_rows(&rows::read(text, form, labelled), text);
}

/// The aggregator's address as it lies in a device's directory.
pub(crate) fn address(store: &Store) -> Result<(), String> {
    Address::read(store, ADDRESS).map(drop).map_err(|error| error.to_string())
}

/// What is typed in a chat is a command that there is, a short word on what is wrong, or reaches the model as it was typed.
pub fn typed(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = Lines::default();
    let mut said = Vec::new();
    for line in text.lines() {
        said.extend(lines.push(line));
    }
    if lines.is_begun() {
        said.push(lines.take());
    }
    assert!(!lines.is_begun());
    let whole: usize = said.iter().map(String::len).sum();
    assert!(whole <= text.len() && said.iter().flat_map(|text| text.lines()).all(|line| text.contains(line)));
    for text in said {
        match meaning(&text) {
            Typed::Words(words) => assert!(words == text || text.strip_prefix('/') == Some(words.as_str())),
            Typed::System(Some(words)) => assert!(!words.is_empty() && text.contains(&words)),
            Typed::Save(path) => assert!(!path.as_os_str().is_empty()),
            Typed::Wrong(why) => assert!(why.len() < WORDS_MAX, "{why}"),
            Typed::System(None) | Typed::Reset | Typed::Help | Typed::Quit => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::mutate;

    #[test]
    fn evaluation_rows_target() {
        mutate::run("evaluation_rows", 20_000, evaluation_rows);
    }

    #[test]
    fn typed_target() {
        mutate::run("typed", 20_000, typed);
    }
}
