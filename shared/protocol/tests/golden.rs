//! Every message as bytes: against `golden/messages.txt`, which `golden/make.py` wrote without this crate.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod samples;

use commonweal_protocol::{Header, Message, bounds, decode, encode};
use std::{collections::BTreeMap, fmt::Debug};

fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    let lines = include_str!("golden/messages.txt").lines();
    lines
        .map(|line| {
            let (name, hex) = line.split_once(": ").unwrap();
            (name, data_encoding::HEXLOWER.decode(hex.as_bytes()).unwrap())
        })
        .collect()
}

fn compare<M: Message + PartialEq + Debug>(samples: &[(&str, M)]) -> usize {
    let golden = golden();
    for (name, message) in samples {
        let expected = &golden[name];
        assert_eq!(encode(message).unwrap(), *expected, "{name}");
        let (header, body) = expected.split_at(Header::BYTES);
        let header = Header::parse(header.try_into().unwrap(), bounds::CONTROL_BYTES_MAX).unwrap();
        assert_eq!(header.body_bytes(), body.len());
        assert_eq!(decode::<M>(body).unwrap(), *message, "{name}");
    }
    samples.len()
}

#[test]
fn every_message_is_encoded_as_it_always_was() {
    let compared = compare(&samples::requests())
        + compare(&samples::replies())
        + compare(&samples::enrolment_requests())
        + compare(&samples::enrolment_replies());
    assert_eq!(compared, golden().len());
}
