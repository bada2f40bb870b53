//! One of each message, with the values that `golden/make.py` has too.

#![allow(dead_code, unreachable_pub, reason = "shared by several test binaries, each of which uses its part")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use commonweal_protocol::{
    Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, CompressSettings, Content, Control, Csr,
    DeviceId, DeviceReport, Digest, Direction, Enroll, Enrolled, EnrolmentReply, EnrolmentRequest, Fault,
    Fetch, Gate, KeyNumber, Lineage, Metric, Mode, Opaque, Open, Poll, PollReply, Receipt, ReconnectWindow,
    Refusal, Refused, Release, Renew, Reply, ReportCard, Request, RoundCounts, RoundId, RoundTask, Scaffold,
    SignedControl, SignedReceipt, SignedRelease, SignedSuccession, SigningKey, Start, Token, TraceContext,
    TrainSettings, Trouble, Version,
};

pub const DEVICE: DeviceId = DeviceId([0x11; 16]);
pub const DIGEST: Digest = Digest([0x22; 32]);
pub const BASE: BaseHash = BaseHash([0xba; 32]);
pub const RECONNECT: ReconnectWindow = ReconnectWindow { after_ms: 30_000, spread_ms: 5_000 };
const ROUND: RoundId = RoundId(300);
pub const TRACE: TraceContext = TraceContext { trace: [0x55; 16], span: [0x66; 8] };
const HASH: Digest = Digest([0x33; 32]);

pub fn key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// The key before [`key`], which signed for it.
pub fn key_before() -> SigningKey {
    SigningKey::from_bytes(&[4; 32])
}

pub fn successions() -> Vec<SignedSuccession> {
    let mut lineage = Lineage::new(KeyNumber(299), AggregatorKey::of(&key_before()));
    lineage.succeed(&key_before(), AggregatorKey::of(&key()), 1_767_225_600_000).unwrap();
    lineage.steps().to_vec()
}

fn csr() -> Csr {
    Csr::new(vec![0x30, 3, 2, 1, 5]).unwrap()
}

fn chain() -> CertificateChain {
    CertificateChain(vec![Opaque::new(vec![0xc1; 4]).unwrap(), Opaque::new(vec![0xc2; 3]).unwrap()])
}

fn chunk() -> Chunk {
    Chunk { offset: 1 << 20, hash: HASH, bytes: Opaque::new(b"abc".to_vec()).unwrap() }
}

pub fn open() -> Open {
    let report = DeviceReport {
        sampled: 60,
        kept: 41,
        dropped: 12,
        refused: 0,
        revised: 7,
        revision_attempts: 9,
        steps: 50,
        trained_tokens: 123_456,
        loss_first: 2.5,
        loss_last: 1.25,
        delta_norm: 0.75,
    };
    Open {
        round: ROUND,
        base: BASE,
        digest: DIGEST,
        length: 1_234_567,
        samples: 48,
        report,
        trace: Some(TRACE),
    }
}

pub fn control() -> Control {
    Control { round: RoundId(299), merged: 0b1101, base: BASE, digest: HASH, length: 70_100 }
}

pub fn task() -> RoundTask {
    RoundTask {
        round: ROUND,
        base: BASE,
        start: Start { version: Version(2), digest: DIGEST, length: 70_000 },
        mode: Mode::Rolora,
        train: TrainSettings {
            steps_max: 50,
            warmup_steps: 5,
            accumulation: 8,
            row_tokens_max: 512,
            learning_rate: 0.001,
            weight_decay: 0.01,
            clip_norm: 1.0,
            proximal_mu: 0.1,
        },
        scaffold: Scaffold::Control(SignedControl::sign(&key(), control()).unwrap()),
        compress: CompressSettings {
            bits: 4,
            block: 64,
            top_k: Some(0.25),
            rotate: true,
            stochastic: true,
            level: 1,
        },
        seed: u64::MAX,
        deadline_ms: 600_000,
    }
}

pub fn release() -> Release {
    Release {
        version: Version(3),
        parent: Some(Version(2)),
        round: Some(ROUND),
        base: BASE,
        digest: DIGEST,
        length: 70_000,
        report_card: ReportCard {
            safe_rate: Some(0.97),
            attack_success_rate: Some(0.04),
            over_refusal_rate: None,
            held_out_loss: Some(2.125),
            gates: vec![
                Gate::judge(Metric::AttackSuccessRate, Direction::AtMost, 0.1, 0.04),
                Gate::judge(Metric::HeldOutLossRise, Direction::AtMost, 0.05, 0.0625),
            ],
            merge: "fedit, mean, fedadam, scaffold".to_owned(),
            counts: RoundCounts {
                devices_selected: 10,
                devices_received: 9,
                devices_merged: 8,
                updates_clipped: 1,
                updates_excluded: 1,
                sampled: 600,
                kept: 410,
                dropped: 120,
                refused: 0,
                revised: 70,
                uploaded_bytes: 12_345_678,
                align_steps: 50,
            },
        },
        created_ms: 1_767_225_600_000,
    }
}

pub fn receipt() -> Receipt {
    Receipt {
        round: ROUND,
        device: DEVICE,
        digest: DIGEST,
        length: 1_234_567,
        received_ms: 1_767_225_600_000,
    }
}

pub fn requests() -> Vec<(&'static str, Request)> {
    vec![
        (
            "request poll",
            Request::Poll(Poll {
                base: BASE,
                installed: Some(Version(2)),
                key: KeyNumber(299),
                trouble: Some(Trouble { version: Version(7), fault: Fault::Damaged }),
            }),
        ),
        ("request open", Request::Open(open())),
        ("request chunk", Request::Chunk(chunk())),
        ("request finish", Request::Finish),
        ("request fetch", Request::Fetch(Fetch { digest: DIGEST, offset: 1 << 20 })),
        ("request renew", Request::Renew(Renew { csr: csr() })),
    ]
}

pub fn replies() -> Vec<(&'static str, Reply)> {
    let refused = Refused { reason: Refusal::StaleRound, reconnect: RECONNECT };
    let release = SignedRelease::sign(&key(), release()).unwrap();
    let receipt = SignedReceipt::sign(&key(), receipt()).unwrap();
    vec![
        ("reply refused", Reply::Refused(refused)),
        (
            "reply poll",
            Reply::Poll(PollReply {
                task: Some(task()),
                release: Some(release),
                successions: successions(),
                reconnect: RECONNECT,
            }),
        ),
        (
            "reply poll empty",
            Reply::Poll(PollReply { task: None, release: None, successions: vec![], reconnect: RECONNECT }),
        ),
        ("reply offset", Reply::Offset(1 << 20)),
        ("reply accepted", Reply::Accepted(Accepted { receipt, reconnect: RECONNECT })),
        ("reply content", Reply::Content(Content { digest: DIGEST, length: 70_000 })),
        ("reply chunk", Reply::Chunk(chunk())),
        ("reply renewed", Reply::Renewed(chain())),
    ]
}

pub fn enrolment_requests() -> Vec<(&'static str, EnrolmentRequest)> {
    let enroll = Enroll { token: Token([0x44; 32]), csr: csr() };
    vec![("enrolment request", EnrolmentRequest::Enroll(enroll))]
}

pub fn enrolment_replies() -> Vec<(&'static str, EnrolmentReply)> {
    let refused = Refused { reason: Refusal::TokenRefused, reconnect: RECONNECT };
    let enrolled = Enrolled {
        device: DEVICE,
        chain: chain(),
        signing_key: AggregatorKey::of(&key()),
        key_number: KeyNumber(300),
    };
    vec![
        ("enrolment refused", EnrolmentReply::Refused(refused)),
        ("enrolment enrolled", EnrolmentReply::Enrolled(enrolled)),
    ]
}
