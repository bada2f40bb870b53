//! What is refused: frames that are too long, of another version, with bytes left over; values out of bounds, in both
//! directions; signatures of something else; texts that are no invitation.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod samples;

use commonweal_protocol::{
    AggregatorKey, Chunk, DecodeError, Direction, EncodeError, EnrolmentReply, Gate, Header, Invalid,
    Invitation, InvitationError, Metric, Opaque, PollReply, ReconnectWindow, Refused, Reply, Request,
    SignatureError, SignedReceipt, SignedRelease, bounds, decode, encode,
};

fn body(request: &Request) -> Vec<u8> {
    encode(request).unwrap().split_off(Header::BYTES)
}

#[test]
fn lengths_are_judged_before_the_body() {
    let announced = |bytes: u32| Header::parse(bytes.to_le_bytes(), bounds::CONTROL_BYTES_MAX);
    assert_eq!(announced(0), Err(DecodeError::Empty));
    assert_eq!(announced(16 << 10).unwrap().body_bytes(), 16 << 10);
    let got = (16 << 10) + 1;
    assert_eq!(announced(got as u32), Err(DecodeError::TooLong { limit: 16 << 10, got }));
    assert!(announced(u32::MAX).is_err());
}

#[test]
fn other_versions_and_leftovers_are_refused() {
    let mut body = body(&Request::Finish);
    assert_eq!(body, [3, 3]);
    body.push(0);
    assert_eq!(decode::<Request>(&body), Err(DecodeError::Trailing(1)));
    assert_eq!(decode::<Request>(&[1, 3]), Err(DecodeError::Version(1)));
    assert_eq!(decode::<Request>(&[]), Err(DecodeError::Empty));
    assert!(matches!(decode::<Request>(&[3, 200]), Err(DecodeError::Payload(_))));
}

#[test]
fn a_full_chunk_fits_its_frame_and_a_fuller_one_does_not_exist() {
    let full = Chunk::new(bounds::CONTENT_BYTES_MAX - (1 << 20), vec![7; bounds::CHUNK_BYTES_MAX]).unwrap();
    let frame = encode(&Request::Chunk(full)).unwrap();
    assert!(frame.len() <= Header::BYTES + bounds::FRAME_BYTES_MAX);
    let fuller = Chunk::new(0, vec![7; bounds::CHUNK_BYTES_MAX + 1]);
    assert!(matches!(fuller, Err(Invalid::TooLarge { .. })));
    assert!(matches!(Chunk::new(0, vec![]), Err(Invalid::TooSmall { .. })));
    assert!(Chunk::new(bounds::CONTENT_BYTES_MAX, vec![1]).is_err());
    assert!(Chunk::new(u64::MAX, vec![1]).is_err());
}

/// The largest control message of each kind keeps the bound that its reader allocates by.
#[test]
fn the_largest_messages_fit_a_control_frame() {
    let mut release = samples::release();
    let gate = Gate::judge(Metric::HeldOutLossRise, Direction::AtMost, 0.05, 0.0625);
    release.report_card.gates = vec![gate; bounds::GATES_MAX];
    release.length = bounds::CONTENT_BYTES_MAX;
    release.created_ms = u64::MAX;
    let release = Some(SignedRelease::sign(&samples::key(), release).unwrap());
    let mut task = samples::task();
    task.deadline_ms = u64::MAX;
    let reconnect =
        ReconnectWindow { after_ms: bounds::RECONNECT_MS_MAX, spread_ms: bounds::RECONNECT_MS_MAX };
    let mut step = samples::successions()[0];
    (step.succession.number.0, step.succession.created_ms) = (u64::MAX, u64::MAX);
    let successions = vec![step; bounds::SUCCESSIONS_MAX];
    let bytes = postcard::to_stdvec(&step).unwrap().len();
    assert_eq!(bytes, bounds::SUCCESSION_BYTES_MAX);
    let poll = Reply::Poll(PollReply { task: Some(task), release, successions, reconnect });
    assert!(encode(&poll).unwrap().len() < bounds::CONTROL_BYTES_MAX);
    let [_, (_, EnrolmentReply::Enrolled(mut enrolled))] =
        <[_; 2]>::try_from(samples::enrolment_replies()).unwrap()
    else {
        panic!()
    };
    let largest = Opaque::new(vec![0; bounds::CERTIFICATE_BYTES_MAX]).unwrap();
    enrolled.chain.0 = vec![largest; bounds::CHAIN_CERTIFICATES_MAX];
    assert!(encode(&EnrolmentReply::Enrolled(enrolled)).unwrap().len() < bounds::CONTROL_BYTES_MAX);
}

/// Each change makes one value wrong. It is refused when sent, and when it arrives from one who does not check.
#[test]
fn values_out_of_bounds_are_refused_both_ways() {
    let open = |change: &dyn Fn(&mut commonweal_protocol::Open)| {
        let mut open = samples::open();
        change(&mut open);
        encode(&Request::Open(open)).is_err()
    };
    assert!(!open(&|_| {}));
    assert!(open(&|open| open.length = 0));
    assert!(open(&|open| open.length = bounds::UPDATE_BYTES_MAX + 1));
    assert!(open(&|open| open.samples = 0));
    assert!(open(&|open| open.report.kept = 60));
    assert!(open(&|open| (open.report.kept, open.report.dropped) = (u32::MAX, u32::MAX)));
    assert!(open(&|open| open.report.steps = u32::MAX));
    assert!(open(&|open| open.report.loss_first = f32::NAN));
    assert!(open(&|open| open.report.delta_norm = f32::INFINITY));
    assert!(open(&|open| open.report.delta_norm = -1.0));

    let task = |change: &dyn Fn(&mut commonweal_protocol::RoundTask)| {
        let mut task = samples::task();
        change(&mut task);
        let reply =
            PollReply { task: Some(task), release: None, successions: vec![], reconnect: samples::RECONNECT };
        encode(&Reply::Poll(reply)).is_err()
    };
    assert!(!task(&|_| {}));
    assert!(task(&|task| task.train.learning_rate = f32::NAN));
    assert!(task(&|task| task.train.learning_rate = -0.1));
    assert!(task(&|task| task.train.learning_rate = 0.0));
    assert!(task(&|task| task.train.steps_max = 0));
    assert!(task(&|task| task.train.warmup_steps = 51));
    assert!(task(&|task| task.train.accumulation = 0));
    assert!(task(&|task| task.train.row_tokens_max = 1));
    assert!(task(&|task| task.train.weight_decay = 2.0));
    assert!(task(&|task| task.train.clip_norm = 0.0));
    assert!(task(&|task| task.train.proximal_mu = f32::INFINITY));
    assert!(task(&|task| task.compress.bits = 5));
    assert!(task(&|task| task.compress.block = 7));
    assert!(task(&|task| task.compress.block = 4097));
    assert!(task(&|task| task.compress.top_k = Some(0.0)));
    assert!(task(&|task| task.compress.level = 0));
    assert!(task(&|task| task.compress.level = 20));
    assert!(task(&|task| task.start.length = 0));

    let release = |change: &dyn Fn(&mut commonweal_protocol::Release)| {
        let mut release = samples::release();
        change(&mut release);
        SignedRelease::sign(&samples::key(), release).is_err()
    };
    assert!(!release(&|_| {}));
    assert!(release(&|release| release.length = bounds::CONTENT_BYTES_MAX + 1));
    assert!(release(&|release| release.report_card.safe_rate = Some(1.1)));
    assert!(release(&|release| release.report_card.attack_success_rate = Some(f64::NAN)));
    assert!(release(&|release| release.report_card.held_out_loss = Some(-1.0)));
    assert!(release(&|release| release.report_card.gates[1].passed = true));
    assert!(release(&|release| release.report_card.merge = "m".repeat(bounds::MERGE_NAME_BYTES_MAX + 1)));
    assert!(release(&|release| {
        let gate = release.report_card.gates[0];
        release.report_card.gates = vec![gate; bounds::GATES_MAX + 1];
    }));

    let successions = vec![samples::successions()[0]; bounds::SUCCESSIONS_MAX + 1];
    let reply = PollReply { task: None, release: None, successions, reconnect: samples::RECONNECT };
    assert!(matches!(encode(&Reply::Poll(reply)), Err(EncodeError::Invalid(_))));

    let reconnect = ReconnectWindow { after_ms: bounds::RECONNECT_MS_MAX + 1, spread_ms: 0 };
    let refused = Refused { reconnect, ..commonweal_protocol::Refusal::Busy.into() };
    assert!(matches!(encode(&Reply::Refused(refused)), Err(EncodeError::Invalid(_))));
    // The same, as a peer that does not check would send it: tag 0, reason 3, the two numbers, little groups of 7 bits.
    let arrives = [3, 0, 3, 0x81, 0x88, 0xb2, 0xa0, 0x02, 0];
    assert!(
        matches!(decode::<Reply>(&arrives), Err(DecodeError::Invalid(_))),
        "{:?}",
        decode::<Reply>(&arrives)
    );
    assert!(encode(&Reply::Offset(bounds::UPDATE_BYTES_MAX + 1)).is_err());
}

#[test]
fn signatures_hold_for_their_value_key_and_kind_only() {
    let key = AggregatorKey::of(&samples::key());
    let other = AggregatorKey::of(&commonweal_protocol::SigningKey::from_bytes(&[6; 32]));
    let receipt = SignedReceipt::sign(&samples::key(), samples::receipt()).unwrap();
    assert_eq!(receipt.verify(&key).unwrap(), &samples::receipt());
    assert!(matches!(receipt.verify(&other), Err(SignatureError::Mismatch(_))));
    let mut changed = receipt;
    changed.receipt.length += 1;
    assert!(matches!(changed.verify(&key), Err(SignatureError::Mismatch(_))));
    for byte in 0..64 {
        let mut changed = receipt;
        changed.signature.0[byte] ^= 0x10;
        assert!(changed.verify(&key).is_err(), "byte {byte}");
    }
    let mut release = SignedRelease::sign(&samples::key(), samples::release()).unwrap();
    release.verify(&key).unwrap();
    release.release.report_card.gates[1].value = 0.01;
    assert!(release.verify(&key).is_err());
    release.signature = receipt.signature;
    assert!(release.verify(&key).is_err());
}

#[test]
fn identifiers_and_signatures_are_text_in_json() {
    let release = SignedRelease::sign(&samples::key(), samples::release()).unwrap();
    let json = serde_json::to_string(&release).unwrap();
    assert!(json.contains(&format!("\"digest\":\"{}\"", "22".repeat(32))), "{json}");
    assert!(json.contains("\"metric\":\"attack_success_rate\""), "{json}");
    assert_eq!(serde_json::from_str::<SignedRelease>(&json).unwrap(), release);
    assert!(serde_json::from_str::<SignedRelease>(&json.replace("22222222", "2222222g")).is_err());
}

#[test]
fn invitations_are_read_as_they_are_written() {
    let (token, authority) = ("ab".repeat(32), "cd".repeat(32));
    for place in ["aggregator.example:4433", "192.0.2.1:1", "[2001:db8::1]:65535"] {
        let text = format!("commonweal://{place}/?token={token}&ca={authority}");
        let invitation: Invitation = format!(" {text}\n").parse().unwrap();
        assert_eq!(invitation.to_string(), text);
        assert!(!format!("{invitation:?}").contains(&token), "a token is not for logs");
    }
    let swapped = format!("commonweal://h:1/?ca={authority}&token={token}");
    assert_eq!(swapped.parse::<Invitation>().unwrap().token.reveal(), token);
}

#[test]
fn texts_that_are_no_invitation_say_why() {
    let (token, authority) = ("ab".repeat(32), "cd".repeat(32));
    let parse = |place: &str, query: &str| {
        format!("commonweal://{place}/?{query}").parse::<Invitation>().unwrap_err()
    };
    let query = format!("token={token}&ca={authority}");
    assert_eq!("https://h:1/".parse::<Invitation>(), Err(InvitationError::Scheme));
    assert_eq!("commonweal://h:1".parse::<Invitation>(), Err(InvitationError::Shape));
    for place in ["h", "h:0", "h:65536", "h:", "[::1]"] {
        assert_eq!(parse(place, &query), InvitationError::Port, "{place}");
    }
    let long = "h".repeat(254) + ":1";
    for place in [":1", "::1:1", "h h:1", "h/x:1", "[h]:1x", "[::1:1", "h%:1", long.as_str()] {
        let error = parse(place, &query);
        assert!(matches!(error, InvitationError::Host | InvitationError::Port), "{place}: {error}");
    }
    for query in ["", "token", &format!("{query}&x=1"), &format!("{query}&")] {
        assert_eq!(parse("h:1", query), InvitationError::UnknownField, "{query}");
    }
    for (query, missing) in [
        (format!("token={token}"), "ca"),
        (format!("ca={authority}"), "token"),
        (format!("{query}&token={token}"), "token"),
        ("token=ab&ca=cd".to_owned(), "token"),
    ] {
        let error = parse("h:1", &query);
        assert!(matches!(error, InvitationError::Field { name, .. } if name == missing), "{query}: {error}");
    }
}
