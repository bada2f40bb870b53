//! The program `links`: what an upload makes of a slow, distant or lossy link, and of an interface that changes in the
//! midst of it.
//!
//! Aggregator and device are the real ones but for the model (`modelless.rs`, `visitor.rs` of the tests); between them is
//! a link in user space (`link.rs`) with a rate, a delay, a buffer and losses, so that no rights and no kernel modules are
//! needed. The share of the link is what of it the update's own bytes took, from the first packet to the receipt.

mod link;

use std::{
    fmt,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use aggregator::{events::Events, round::Policy};
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use commonweal_protocol::{DeviceReport, Invitation, KeyNumber, Poll, RoundId};
use commonweal_tests::{
    child::{self, Child, tell},
    modelless::{self, Modelless},
    visitor::{self, BASE},
};
use commonweal_transport::{
    Clock, Congestion, Credentials, Link as _, LinkLimits, QuicLink, ServeLimits, Uploaded,
};
use edge_client::{compress::Packed, upload};
use link::{Link, Shape};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// How long the end of a connection may take.
const CLOSING: Duration = Duration::from_millis(700);

/// Sends updates over links of several kinds, and measures how much of each they use.
///
/// Prints a line for each link. Exit codes: 0 done, 1 failed, 2 usage.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Examples:\n  links\n  links --delays 50 --losses 0,1 --json")]
struct Arguments {
    /// Rate of the link in each direction, in Mbit/s
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    mbit: u32,
    /// Round trips, in ms
    #[arg(long, default_values_t = [50, 150, 300], value_delimiter = ',', value_name = "MS,…")]
    delays: Vec<u32>,
    /// Packets lost in each direction, in percent
    #[arg(long, default_values_t = [0.0, 1.0, 5.0], value_delimiter = ',', value_name = "%,…")]
    losses: Vec<f64>,
    /// Size of the update, in MB (10⁶ bytes)
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    update_mb: u32,
    /// When to give an upload up
    #[arg(long, default_value_t = 120, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    patience: u64,
    /// Draws the losses
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// One JSON object a link instead of a table
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// How the program calls itself.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    /// Be the aggregator of a directory
    #[command(hide = true)]
    Serve { dir: PathBuf },
}

/// What the aggregator's process tells, once.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    invitation: String,
    address: SocketAddr,
}

/// One upload.
#[derive(Debug, Serialize)]
struct Measured {
    round_trip_ms: u32,
    loss_percent: f64,
    congestion: &'static str,
    /// Whether the device's interface changed in the middle.
    interface_changed: bool,
    /// From the first packet to the receipt; none if it was given up.
    seconds: Option<f64>,
    /// The update's bytes over what the link could have carried meanwhile.
    share_of_link: Option<f64>,
    /// Bytes of the update that were given to the connection again, over its length.
    sent_again: Option<f64>,
    /// Bytes of packets from the device over the update's length, those lost included.
    on_the_wire: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    child::program("error", || match &arguments.part {
        Some(Part::Serve { dir }) => serve(&arguments, dir),
        None => measure(&arguments),
    })
}

/// An aggregator whose every round is one update.
fn serve(arguments: &Arguments, path: &Path) -> Result<()> {
    let round = Policy { goal: 1, quorum: 1, over_selection: 1.0, wait_ms: 1_000, ..Policy::default() };
    let mut config = modelless::config(round);
    config.receive.releases_kept = 2;
    let aggregator = Modelless::open(path, 4 * arguments.update_mb, config, Events::to(|_| ()))?;
    aggregator.serve(0, ServeLimits::default(), |aggregator, address| {
        let invitation = aggregator.invite(1, address)?.pop().context("an invitation")?;
        tell(&Told { invitation, address });
        Ok(())
    })
}

fn measure(arguments: &Arguments) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let place = directory.path().join("aggregator");
    let place = place.to_str().context("a temporary directory whose name is text")?.to_owned();
    let size = arguments.update_mb.to_string();
    let mut aggregator = Child::start(["--update-mb".to_owned(), size, "serve".to_owned(), place])?;
    let told: Told = aggregator.hear()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let invitation: Invitation = told.invitation.parse()?;
    let credentials = runtime.block_on(visitor::enroll(&invitation, &LinkLimits::default()))?;
    let layout = visitor::layout(4 * arguments.update_mb)?;
    let update = visitor::noise(&layout, &mut ChaCha8Rng::seed_from_u64(0))?;
    let mut device = Device { credentials, update, address: told.address, delivered: None };
    let mut out = std::io::stdout().lock();
    if !arguments.json {
        let (megabytes, mbit) = (arguments.update_mb, arguments.mbit);
        writeln!(out, "An update of {megabytes} MB over {mbit} Mbit/s; a buffer of 100 ms.\n")?;
        writeln!(
            out,
            "| round trip | loss | congestion | seconds | share of the link | sent again | bytes on the wire |"
        )?;
        writeln!(out, "|---|---|---|---|---|---|---|")?;
    }
    for (round_trip_ms, loss_percent, congestion, changes) in kinds(arguments) {
        let shape = Shape {
            bits_per_second: f64::from(arguments.mbit) * 1e6,
            delay: Duration::from_secs_f64(f64::from(round_trip_ms) / 2e3),
            buffer: Duration::from_millis(100),
            loss: loss_percent / 100.0,
        };
        let patience = Duration::from_secs(arguments.patience);
        let sending = device.send(shape, arguments.seed, congestion, changes, patience);
        let (uploaded, seconds, wire_bytes) = runtime.block_on(sending)?;
        let length = device.update.bytes().len() as f64;
        let seconds = uploaded.map(|_| seconds);
        let measured = Measured {
            round_trip_ms,
            loss_percent,
            congestion: if congestion == Congestion::Bbr { "bbr" } else { "cubic" },
            interface_changed: changes,
            seconds,
            share_of_link: seconds.map(|seconds| length * 8.0 / seconds / shape.bits_per_second),
            sent_again: uploaded.map(|uploaded| uploaded.sent_bytes as f64 / length - 1.0),
            on_the_wire: wire_bytes as f64 / length,
        };
        if arguments.json {
            writeln!(out, "{}", serde_json::to_string(&measured)?)?;
        } else {
            writeln!(out, "{measured}")?;
        }
        out.flush()?;
    }
    Ok(())
}

/// Round trip, loss, congestion control, and whether the interface changes.
fn kinds(arguments: &Arguments) -> Vec<(u32, f64, Congestion, bool)> {
    let mut kinds = Vec::new();
    for congestion in [Congestion::Cubic, Congestion::Bbr] {
        for &delay in &arguments.delays {
            for &loss in &arguments.losses {
                kinds.push((delay, loss, congestion, false));
            }
        }
    }
    kinds.extend(arguments.delays.iter().map(|&delay| (delay, 0.0, Congestion::Cubic, true)));
    kinds
}

impl fmt::Display for Measured {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent =
            |share: Option<f64>| share.map_or("–".to_owned(), |it| format!("{:.0} %", it * 100.0));
        let seconds = self.seconds.map_or("given up".to_owned(), |seconds| format!("{seconds:.1}"));
        let changed = if self.interface_changed { ", interface changed" } else { "" };
        let Self { round_trip_ms, loss_percent, congestion, share_of_link, sent_again, on_the_wire, .. } =
            self;
        write!(
            formatter,
            "| {round_trip_ms} ms{changed} | {loss_percent} % | {congestion} | {seconds} | {} | {} | {on_the_wire:.2} × |",
            percent(*share_of_link),
            percent(*sent_again)
        )
    }
}

struct Device {
    credentials: Credentials,
    update: Packed,
    address: SocketAddr,
    delivered: Option<RoundId>,
}

impl Device {
    /// Delivers the update of one round over a link of this shape; without an answer in time, gives up. Seconds, and the
    /// bytes of the packets that the device sent meanwhile.
    async fn send(
        &mut self,
        shape: Shape,
        seed: u64,
        congestion: Congestion,
        changes: bool,
        patience: Duration,
    ) -> Result<(Option<Uploaded>, f64, u64)> {
        // Work is asked for, and the connection made, before the clock starts: over a link that delays nothing.
        let link = Arc::new(Link::between(self.address, seed).await?);
        let limits = LinkLimits { congestion, ..LinkLimits::default() };
        let (host, port) = (link.address().ip().to_string(), link.address().port());
        let quic = QuicLink::new(&host, port, self.credentials.clone(), limits, Clock::system())?;
        let round = self.task(&quic).await?;
        link.become_of(shape);
        let before = link.bytes_from_device();
        let open = upload::announce(round, BASE, &self.update, DeviceReport::default(), 1);
        let begun = Instant::now();
        let changing = async {
            if changes {
                // In the middle of what takes this long at best.
                let bits = self.update.bytes().len() as f64 * 8.0;
                tokio::time::sleep(Duration::from_secs_f64(bits / shape.bits_per_second / 2.0)).await;
                link.lose_path();
                quic.rebind().await.context("the device has no other interface")?;
            }
            anyhow::Ok(())
        };
        let sending = tokio::time::timeout(patience, quic.upload(&open, self.update.bytes()));
        let (sent, changed) = tokio::join!(sending, changing);
        changed?;
        let seconds = begun.elapsed().as_secs_f64();
        let wire_bytes = link.bytes_from_device() - before;
        let uploaded = if let Ok(uploaded) = sent {
            Some(uploaded?)
        } else {
            // What is still to come goes quickly, so that the next link begins with a round of its own.
            link.become_of(Shape::default());
            quic.upload(&open, self.update.bytes()).await?;
            None
        };
        self.delivered = Some(round);
        // The connections' end must get through, or they hold the device's slots until they are found idle.
        link.become_of(Shape::default());
        drop(quic);
        tokio::time::sleep(CLOSING).await;
        Ok((uploaded, seconds, wire_bytes))
    }

    /// The next round's task.
    async fn task(&self, quic: &QuicLink) -> Result<RoundId> {
        for _ in 0..600 {
            let reply =
                quic.poll(Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None }).await?;
            if let Some(task) = reply.task.filter(|task| Some(task.round) != self.delivered) {
                ensure!(self.update.bytes().len() > 1 << 20, "the update has several chunks");
                return Ok(task.round);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("no task in a minute")
    }
}
