//! The three forms in which conversations are published, to a checked [`Sample`]: chat JSONL (`messages`), preference
//! JSONL (`chosen`/`rejected`, as HH-RLHF), and prompts with targets (`goal,target`, as AdvBench's CSV).
//!
//! From `rows.rs`, which gives one row; to `sample.rs`.

use commonweal_runtime::Role;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    rows::RowError,
    sample::{Row, Sample, Turn},
};

/// A row of one of the three forms.
pub fn sample_of(row: Value) -> Result<Sample, RowError> {
    if row.get("messages").is_some() {
        let row: Row =
            fields(row, "\"messages\": a list of \"role\" (system, user or assistant) with \"content\"")?;
        return Ok(Sample::try_from(row)?);
    }
    if row.get("chosen").is_some() {
        let Preference { chosen, rejected } = fields(row, "\"chosen\" and \"rejected\", both text")?;
        return preferred(&chosen, &rejected);
    }
    let Pair { prompt, response } = fields(
        row,
        "\"messages\", or \"chosen\" and \"rejected\", or \"prompt\" and \"response\" (goal, target)",
    )?;
    Ok(Sample::from_pair(prompt, response)?)
}

/// The row's fields, or what was expected; serde's own words could quote the text.
pub(crate) fn fields<T: DeserializeOwned>(row: Value, expected: &'static str) -> Result<T, RowError> {
    serde_json::from_value(row).map_err(|_| RowError::Form(expected))
}

#[derive(Deserialize)]
struct Preference {
    chosen: String,
    rejected: String,
}

#[derive(Deserialize)]
struct Pair {
    #[serde(alias = "goal")]
    prompt: String,
    #[serde(alias = "completion", alias = "target")]
    response: String,
}

/// Both dialogues as one sample: they must differ in the last reply only, or the worse one answers something else.
fn preferred(chosen: &str, rejected: &str) -> Result<Sample, RowError> {
    let turns = dialogue(chosen).ok_or(RowError::Dialogue("chosen"))?;
    let mut worse = dialogue(rejected).ok_or(RowError::Dialogue("rejected"))?;
    match worse.pop() {
        Some(Turn { role: Role::Assistant, content })
            if turns.split_last().is_some_and(|(_, before)| before == worse.as_slice()) =>
        {
            Ok(Sample::new(turns, Some(content))?)
        }
        _ => Err(RowError::NoPair),
    }
}

/// `"\n\nHuman: … \n\nAssistant: …"` into turns.
fn dialogue(text: &str) -> Option<Vec<Turn>> {
    let mut turns = Vec::new();
    let mut rest = text.trim_start().strip_prefix("Human:").map(|rest| (Role::User, rest))?;
    loop {
        let (role, body) = rest;
        let next = [("\n\nHuman:", Role::User), ("\n\nAssistant:", Role::Assistant)]
            .into_iter()
            .filter_map(|(mark, role)| body.find(mark).map(|at| (at, mark.len(), role)))
            .min_by_key(|(at, ..)| *at);
        let end = next.map_or(body.len(), |(at, ..)| at);
        turns.push(Turn { role, content: body[..end].trim().to_owned() });
        match next {
            Some((at, length, role)) => rest = (role, &body[at + length..]),
            None => return Some(turns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rows::{self, Form, Parsed},
        sample::{MESSAGE_BYTES_MAX, MESSAGES_MAX, SampleError},
    };

    fn parse(text: &str) -> Parsed<Sample> {
        rows::read(text.as_bytes(), Form::Jsonl, sample_of).unwrap()
    }

    fn only(text: &str) -> Sample {
        let mut parsed = parse(text);
        assert_eq!((parsed.good.len(), &parsed.bad[..]), (1, &[][..]));
        parsed.good.remove(0).1
    }

    fn refused(text: &str) -> RowError {
        let mut parsed = parse(text);
        assert_eq!((parsed.good.len(), parsed.bad.len()), (0, 1));
        parsed.bad.remove(0).reason
    }

    #[test]
    fn a_malformed_line_is_reported_by_number_and_the_good_ones_are_kept() {
        let good = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#;
        let parsed = parse(&format!("{good}\n{{\"messages\": [\n\n{good}\n{{\"other\":1}}\n"));
        assert_eq!(parsed.good.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(parsed.bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [2, 5]);
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_quoted() {
        let role = refused(r#"{"messages":[{"role":"robot","content":"secret"}]}"#).to_string();
        assert!(role.contains("system, user or assistant") && !role.contains("robot"), "{role}");
        assert!(matches!(refused("[1]"), RowError::Form(_)));
        assert!(matches!(refused(r#"{"chosen":"x"}"#), RowError::Form(_)));
        assert_eq!(refused(r#"{"chosen":"x","rejected":"y"}"#), RowError::Dialogue("chosen"));
        let sample = |text: &str| match refused(text) {
            RowError::Sample(error) => error,
            other => panic!("{other}"),
        };
        assert_eq!(sample(r#"{"prompt":"a","response":" "}"#), SampleError::EmptyMessage { index: 1 });
        assert_eq!(sample(r#"{"messages":[{"role":"user","content":"a"}]}"#), SampleError::NoReply);
        assert_eq!(sample(r#"{"messages":[{"role":"assistant","content":"a"}]}"#), SampleError::NoUser);
        assert_eq!(sample(r#"{"messages":[]}"#), SampleError::NoUser);
        let turns = vec![r#"{"role":"user","content":"a"}"#; MESSAGES_MAX + 1].join(",");
        let messages = MESSAGES_MAX + 1;
        assert_eq!(sample(&format!("{{\"messages\":[{turns}]}}")), SampleError::Messages { messages });
        let long = "a".repeat(MESSAGE_BYTES_MAX + 1);
        let bytes = long.len();
        let text = format!("{{\"prompt\":\"{long}\",\"response\":\"x\"}}");
        assert_eq!(sample(&text), SampleError::MessageLong { index: 0, bytes });
    }

    #[test]
    fn preference_pairs_keep_the_rejected_reply() {
        let pair = |chosen: &str, rejected: &str| {
            let dialogue = |last: &str| format!("\n\nHuman: a\n\nAssistant: b\n\nHuman: {last}");
            serde_json::json!({"chosen": dialogue(chosen), "rejected": dialogue(rejected)}).to_string()
        };
        let sample = only(&pair("c\n\nAssistant: good", "c\n\nAssistant: bad"));
        assert_eq!((&*sample.prompt(), sample.response(), sample.rejected()), ("c", "good", Some("bad")));
        assert_eq!(sample.turns().len(), 4);
        // Our own form holds such a pair too: what `revise` prints, `add` reads.
        assert_eq!(only(&serde_json::to_string(&sample).unwrap()), sample);
        // The person's own words are no reply to avoid, and a reply to other words no worse one.
        assert_eq!(refused(&pair("c\n\nAssistant: good", "c")), RowError::NoPair);
        assert_eq!(refused(&pair("c\n\nAssistant: good", "d\n\nAssistant: bad")), RowError::NoPair);
    }

    #[test]
    fn csv_of_goals_and_targets_is_read_as_published() {
        let text = "goal,target\n\"Write, a thing\",\"Sure, here\"\nonly one\nWrite b,Sure b\n";
        let parsed = rows::read(text.as_bytes(), Form::Csv, sample_of).unwrap();
        assert_eq!(parsed.good.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 4]);
        assert_eq!(parsed.good[0].1.prompt(), "Write, a thing");
        assert_eq!(parsed.bad[0].line, 3);
    }
}
