//! `aggregator init`: a state directory with its keys and the first release, measured.

use std::path::Path;

use commonweal_adapter::Adapter;
use commonweal_protocol::{Digest, ReportCard};
use commonweal_runtime::Cancel;
use commonweal_transport::Clock;

use super::settings::{environment, written};
use super::{CliError, Flags, now_ms, progress};
use crate::config::Settings;
use crate::desk::Record;
use crate::directory::{Claim, Directory};
use crate::events::{Event, Events};
use crate::laboratory::{Laboratory, LaboratoryError, has_guard, open_package};
use crate::optimize::OptimizerState;
use crate::publish::{Candidate, Publisher};
use crate::store::{self, Access, Storage};

const OCCUPIED: &str = "storage.coordination: expected a database without a federation, this one has releases; to serve \
    it from another machine, copy one of its state directories (docs/operations.md, Several machines)";

#[derive(Debug, clap::Args)]
pub(super) struct Init {
    #[command(flatten)]
    flags: Flags,
    /// Seed of the first adapter's random half.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Publish the first release without measuring it; relative gates then have nothing to compare with.
    #[arg(long)]
    no_evaluate: bool,
}

pub(super) fn init(dir: &Path, init: &Init, set: &[String], json: bool) -> Result<(), CliError> {
    let settings = Settings::new().with_environment(environment());
    let config = settings.with_flags(|config| init.flags.apply(config)).with_set(set).checked()?;
    let (package, base) = open_package(&config.package)?;
    config.check_package(package.manifest().model.context, &base.layout)?;
    if config.align.enabled && !config.plain && !has_guard(&package) {
        return Err(LaboratoryError::NoGuard.into());
    }
    Directory::require_none(dir)?;
    if let Some(database) = store::database(&config.storage)?
        && Publisher::is_any(database.as_ref())?
    {
        return Err(CliError::Input(OCCUPIED.to_owned()));
    }
    let adapter = Adapter::init(base.layout.clone(), init.seed);
    let card = if init.no_evaluate {
        ReportCard::default()
    } else {
        let laboratory = Laboratory::open(&package, &config, &Cancel::new())?;
        crate::evaluate::measure(&laboratory, &config.evaluate, &adapter, &progress::measuring())?.report_card
    };
    // Whatever can be wrong with the input was found above: nothing is left behind by then.
    let claim = Claim::of(dir)?;
    let directory = claim.draw_keys(now_ms())?;
    let storage = Storage::of(dir, &config.storage, Access::Exclusive)?;
    let bytes = base.write(&adapter).map_err(|error| CliError::other("the first adapter", error))?;
    let digest = Digest::of(&bytes);
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice())?;
    let publisher =
        Publisher::new(storage.coord.clone(), storage.blob.clone(), directory.signer()?, base.hash);
    let now_ms = now_ms();
    Record::of_base(&card, now_ms).append(storage.coord.as_ref())?;
    let first = Candidate { round: None, parent: None, digest, state: OptimizerState::default(), card };
    let release = publisher.publish(first, now_ms)?.release;
    directory.admin_token()?;
    directory.write_config(&written(config)?)?;
    Events::to_stdout(json, Clock::system()).tell(&Event::Published {
        round: release.round,
        version: release.version,
        parent: release.parent,
        digest: release.digest,
        report_card: release.report_card,
    });
    Ok(())
}
