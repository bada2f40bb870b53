//! Every limit on what a peer can make the other side hold, in one place, checked against each other at compile time.
//! Neighbours: `frame` refuses lengths by these before it allocates; `commonweal-transport` sets its windows by them.

/// Bytes of one chunk of an upload or a download.
///
/// One mebibyte: at 1 Mbit/s a chunk takes 8 s, so a cut costs at most that. What all transfers at once hold is worked
/// out in `commonweal-transport`'s limits.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Room in a frame around a chunk's bytes: the message's tag (1), offset (varint, 10), hash (32), length (varint, 4),
/// rounded up.
pub const CHUNK_OVERHEAD_BYTES_MAX: usize = 64;

/// Bytes of a frame's body (version and payload) where a chunk may come.
pub const FRAME_BYTES_MAX: usize = CHUNK_BYTES_MAX + CHUNK_OVERHEAD_BYTES_MAX;

/// Bytes of a frame's body where no chunk may come: the first frame of a stream, every frame of an enrolment, and
/// every reply but a chunk.
///
/// The largest is a poll's reply: a task (under 400 bytes), a signed release with [`GATES_MAX`] gates (under 24 bytes
/// each, so under 1 KiB in all) and [`SUCCESSIONS_MAX`] × [`SUCCESSION_BYTES_MAX`]; or a certificate chain,
/// [`CHAIN_CERTIFICATES_MAX`] × [`CERTIFICATE_BYTES_MAX`].
pub const CONTROL_BYTES_MAX: usize = 16 << 10;

/// Bytes of one update.
///
/// An 8-billion-parameter Llama at rank 64 on all seven linears has 168 M adapter parameters: 8 bits and a scale for
/// every 64 make 178 MB. The small models of this project send 0.5–3 MB.
pub const UPDATE_BYTES_MAX: u64 = 256 << 20;

/// Bytes of one published adapter: the same 168 M parameters as 32-bit floats are 671 MB.
pub const CONTENT_BYTES_MAX: u64 = 1 << 30;

/// Bytes of one DER certificate (ours are under 700).
pub const CERTIFICATE_BYTES_MAX: usize = 4 << 10;

/// Bytes of one DER certificate signing request (ours are under 300).
pub const CSR_BYTES_MAX: usize = 4 << 10;

/// Certificates of a chain: the device's and the authority's, and one between for who has one.
pub const CHAIN_CERTIFICATES_MAX: usize = 3;

/// Gates of a report card: one for each metric and direction is 10; room for more metrics.
pub const GATES_MAX: usize = 32;

/// Bytes of a merge's name on a report card; the longest of ours has 41.
pub const MERGE_NAME_BYTES_MAX: usize = 64;

/// Rotations of the aggregator's signing key, in all: one a month for eight years. A device that was away for all of
/// them catches up by one poll.
pub const SUCCESSIONS_MAX: usize = 100;

/// Bytes of one step of that chain: number (varint, 10), key (32), date (10), signature (1 + 64).
pub const SUCCESSION_BYTES_MAX: usize = 117;

/// Characters of a host in an invitation (a DNS name's limit).
pub const HOST_CHARACTERS_MAX: usize = 253;

/// Longest wait and longest spread that a peer may ask of a device: one week.
pub const RECONNECT_MS_MAX: u32 = 7 * 24 * 3600 * 1000;

/// Least learning rate: at none at all a device would train for nothing, and the trainer refuses it.
pub const LEARNING_RATE_MIN: f64 = 1e-12;

/// Training steps of one round on a device. The paper uses tens.
pub const STEPS_MAX: u32 = 100_000;

/// Tokens of one training row.
pub const ROW_TOKENS_MAX: u32 = 32_768;

/// Values that share a scale, from and to. These and the next are what `commonweal-adapter` packs by; a test of the
/// aggregator, which knows both, compares them.
pub const COMPRESS_BLOCK: (u16, u16) = (8, 4096);

/// Levels of zstd, from and to.
pub const COMPRESS_LEVEL: (u8, u8) = (1, 19);

/// Bytes that must arrive within one stall window, or the frame's end: less is a stalled peer.
///
/// At the default window of 30 s this is 273 bit/s; a chunk sent so slowly would take 8.5 hours, and one peer can
/// hold one slot no longer than its update is.
pub const PROGRESS_BYTES_MIN: usize = 1 << 10;

const _: () = assert!(CONTROL_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(CONTROL_BYTES_MAX > CHAIN_CERTIFICATES_MAX * CERTIFICATE_BYTES_MAX + 128);
const _: () = assert!(CONTROL_BYTES_MAX > CSR_BYTES_MAX + 128);
const _: () = assert!(CONTROL_BYTES_MAX > GATES_MAX * 24 + 1024 + SUCCESSIONS_MAX * SUCCESSION_BYTES_MAX);
const _: () = assert!(CHUNK_OVERHEAD_BYTES_MAX >= 1 + 10 + 32 + 4);
const _: () = assert!(FRAME_BYTES_MAX <= u32::MAX as usize);
const _: () = assert!(UPDATE_BYTES_MAX >= CHUNK_BYTES_MAX as u64);
const _: () = assert!(PROGRESS_BYTES_MIN <= CONTROL_BYTES_MAX);
