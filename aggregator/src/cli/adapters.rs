//! `aggregator rollback`, `export` and `evaluate`: what is done with one release's adapter.

use std::fs;
use std::path::PathBuf;

use commonweal_adapter::{Adapter, AdapterKind, export_peft};
use commonweal_protocol::{Version, bounds};
use commonweal_runtime::Cancel;
use commonweal_transport::Clock;
use serde_json::json;

use super::{CliError, Flags, Opened, now_ms, progress, say, say_json};
use crate::evaluate::{judge, measure, refusal};
use crate::events::{Event, Events, card_sentence};
use crate::laboratory::{Base, Laboratory, open_package};

#[derive(Debug, clap::Args)]
pub(super) struct ExportVerb {
    /// The release.
    version: u64,
    /// `peft` (Hugging Face) or `safetensors` (as devices get it).
    #[arg(long, default_value = "peft")]
    format: Format,
    /// A new or empty folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    Peft,
    Safetensors,
}

#[derive(Debug, clap::Args)]
pub(super) struct EvaluateVerb {
    #[command(flatten)]
    flags: Flags,
    /// The release [default: the current one].
    #[arg(long, conflicts_with = "adapter")]
    version: Option<u64>,
    /// An adapter file in place of a release.
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
}

pub(super) fn rollback(opened: &Opened, version: u64, json: bool) -> Result<(), CliError> {
    let (publisher, _) = opened.publisher()?;
    let release = publisher.roll_back(Version(version), now_ms())?.release;
    Events::to_stdout(json, Clock::system()).tell(&Event::Published {
        round: None,
        version: release.version,
        parent: release.parent,
        digest: release.digest,
        report_card: release.report_card,
    });
    Ok(())
}

fn load(opened: &Opened, base: &Base, version: Option<u64>) -> Result<(Version, Adapter), CliError> {
    let (publisher, _) = opened.publisher()?;
    let release = match version {
        Some(version) => publisher.release(Version(version))?.release,
        None => publisher.head()?.ok_or_else(|| CliError::Input("there is no release".to_owned()))?.release,
    };
    let bytes = opened.storage.blob.read_all(&release.digest, bounds::CONTENT_BYTES_MAX)?;
    let name = format!("release {}", release.version);
    Ok((release.version, base.read(&name, &bytes, AdapterKind::Assistant)?))
}

pub(super) fn export(opened: &Opened, verb: &ExportVerb, json: bool) -> Result<(), CliError> {
    let (package, base) = open_package(&opened.config.package)?;
    let (version, adapter) = load(opened, &base, Some(verb.version))?;
    let failed = |error| CliError::other(format!("{}: cannot be written", verb.out.display()), error);
    fs::create_dir_all(&verb.out).map_err(failed)?;
    if fs::read_dir(&verb.out).map_err(failed)?.next().is_some() {
        return Err(CliError::Input(format!("{}: expected an empty folder", verb.out.display())));
    }
    let not_made = |error| CliError::other("the adapter", error);
    let files = match verb.format {
        Format::Peft => {
            let exported = export_peft(&adapter, &package.manifest().model.name).map_err(not_made)?;
            vec![
                ("adapter_config.json", exported.config_json),
                ("adapter_model.safetensors", exported.model_safetensors),
            ]
        }
        Format::Safetensors => vec![("adapter.safetensors", base.write(&adapter).map_err(not_made)?)],
    };
    for (name, bytes) in &files {
        fs::write(verb.out.join(name), bytes).map_err(failed)?;
    }
    if json {
        let names: Vec<_> = files.iter().map(|(name, _)| name).collect();
        return say_json(&json!({ "event": "exported", "version": version, "files": names }));
    }
    say(&format!("release {version} is in {}", verb.out.display()));
    Ok(())
}

pub(super) fn evaluate(mut opened: Opened, verb: &EvaluateVerb, json: bool) -> Result<(), CliError> {
    verb.flags.apply(&mut opened.config);
    opened.config.check()?;
    let (package, base) = open_package(&opened.config.package)?;
    opened.config.check_package(package.manifest().model.context, &base.layout)?;
    let (name, adapter) = if let Some(path) = &verb.adapter {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|error| CliError::Input(format!("{name}: {error}")))?;
        let adapter = base.read(&name, &bytes, AdapterKind::Assistant)?;
        (name, adapter)
    } else {
        let (version, adapter) = load(&opened, &base, verb.version)?;
        (format!("release {version}"), adapter)
    };
    let (publisher, _) = opened.publisher()?;
    let laboratory = Laboratory::open(&package, &opened.config, &Cancel::new())?;
    let mut figures = measure(&laboratory, &opened.config.evaluate, &adapter, &progress::measuring())?;
    let head = publisher.head()?.map(|signed| signed.release.report_card);
    figures.report_card.gates = judge(&figures.report_card, head.as_ref(), &opened.config.evaluate.gates);
    if json {
        say_json(&json!({ "event": "evaluated", "adapter": name, "figures": figures }))?;
    } else {
        say(&format!("{name}: {}", card_sentence(&figures.report_card)));
    }
    refusal(&figures.report_card, &opened.config.evaluate.gates)
        .map_or(Ok(()), |reason| Err(CliError::Gate(reason)))
}
