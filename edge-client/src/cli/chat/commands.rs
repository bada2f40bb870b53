//! What a typed text means: words for the model, or a command. Pure; `chat.rs` does it.

use std::path::PathBuf;

/// What `/help` says.
pub(super) const HELP: &str = "\
/reset         forget what was said so far
/system TEXT   instructions for the model, from here on; without TEXT, none
/save FILE     write the conversation to a new file, as `edge-client add` reads it
/help          this
/quit          end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next; \"\"\" begins and ends several lines.
//text says /text to the model.";

/// A typed text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Typed {
    Words(String),
    Reset,
    System(Option<String>),
    Save(PathBuf),
    Help,
    Quit,
    /// No command that there is, or one that lacks something; what to say about it.
    Wrong(String),
}

/// What a text means.
pub(in crate::cli) fn meaning(text: &str) -> Typed {
    let Some(command) = text.strip_prefix('/') else { return Typed::Words(text.to_owned()) };
    if command.starts_with('/') {
        return Typed::Words(command.to_owned());
    }
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = rest.trim();
    match name {
        "reset" => Typed::Reset,
        "system" => Typed::System((!rest.is_empty()).then(|| rest.to_owned())),
        "save" if rest.is_empty() => Typed::Wrong("/save: expected the name of a file".to_owned()),
        "save" => Typed::Save(rest.into()),
        "help" => Typed::Help,
        "quit" => Typed::Quit,
        _ => {
            // As much of it as a person reads.
            let name: String = name.chars().take(100).collect();
            Typed::Wrong(format!("no command /{name}; /help tells which there are, //{name} says /{name}"))
        }
    }
}

/// Lines that together are one text.
#[derive(Debug, Default)]
pub(in crate::cli) struct Lines {
    said: Vec<String>,
    in_block: bool,
}

const BLOCK: &str = "\"\"\"";

impl Lines {
    /// Whether a text was begun.
    pub(in crate::cli) fn is_begun(&self) -> bool {
        self.in_block || !self.said.is_empty()
    }

    /// One more line; the whole text once it is complete.
    pub(in crate::cli) fn push(&mut self, line: &str) -> Option<String> {
        if self.in_block {
            match line.trim_end().strip_suffix(BLOCK) {
                None => self.said.push(line.to_owned()),
                Some(last) => {
                    self.in_block = false;
                    if !last.is_empty() {
                        self.said.push(last.to_owned());
                    }
                    return Some(self.take());
                }
            }
            return None;
        }
        match line.trim_start().strip_prefix(BLOCK) {
            Some(rest) if self.said.is_empty() => {
                self.in_block = true;
                if rest.is_empty() { None } else { self.push(rest) }
            }
            _ => {
                if let Some(more) = line.strip_suffix('\\') {
                    self.said.push(more.to_owned());
                    return None;
                }
                self.said.push(line.to_owned());
                Some(self.take())
            }
        }
    }

    /// What was said so far: no more lines will come.
    pub(in crate::cli) fn take(&mut self) -> String {
        self.in_block = false;
        std::mem::take(&mut self.said).join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_words() {
        let words = |text: &str| Typed::Words(text.to_owned());
        assert_eq!(meaning("how /reset works"), words("how /reset works"));
        assert_eq!(meaning("//reset"), words("/reset"));
        assert_eq!(meaning("/reset"), Typed::Reset);
        assert_eq!(meaning("/system be brief"), Typed::System(Some("be brief".into())));
        assert_eq!(meaning("/system"), Typed::System(None));
        assert_eq!(meaning("/save a b.jsonl "), Typed::Save("a b.jsonl".into()));
        assert_eq!((meaning("/help"), meaning("/quit")), (Typed::Help, Typed::Quit));
        assert!(
            matches!(meaning("/save"), Typed::Wrong(_)) && matches!(meaning("/etc/hosts"), Typed::Wrong(_))
        );
    }

    #[test]
    fn lines_go_on_and_blocks_end() {
        let read = |lines: &[&str]| {
            let mut reading = Lines::default();
            let mut texts: Vec<String> = lines.iter().filter_map(|line| reading.push(line)).collect();
            if reading.is_begun() {
                texts.push(format!("({})", reading.take()));
            }
            texts
        };
        assert_eq!(read(&["a", "b"]), ["a", "b"]);
        assert_eq!(read(&["a\\", "b", "c"]), ["a\nb", "c"]);
        assert_eq!(read(&["\"\"\"", "a", "", "  b", "\"\"\"", "c"]), ["a\n\n  b", "c"]);
        assert_eq!(read(&["\"\"\"a", "b\"\"\""]), ["a\nb"]);
        assert_eq!(read(&["\"\"\"one line\"\"\""]), ["one line"]);
        assert_eq!(read(&["a\\"]), ["(a)"]);
        assert_eq!(read(&["\"\"\"", "a"]), ["(a)"]);
    }
}
