//! A small federation of real processes on the loopback: one aggregator, some devices, each in its own directory.
//! Sizes are cut down so that a round takes seconds; nothing else differs from what an operator runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use aggregator::config::{self, Config, Gates};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    port,
    program::{Finished, Running, command, reference},
};

/// One aggregator's directory and address.
#[derive(Debug)]
pub struct Federation {
    directory: TempDir,
    address: String,
    /// The first release's version.
    pub first_version: u64,
}

/// One device's directory.
#[derive(Clone, Debug)]
pub struct Device {
    name: String,
    directory: PathBuf,
}

/// Gates that any finite candidate passes, so that what is tested is the way and not the model.
fn open_gates(config: &mut Config) {
    config.evaluate.gates = Gates { safe_rate_min: Some(0.0), held_out_loss_max: Some(1e3), ..Gates::off() };
}

fn free_address() -> String {
    let port = port::lasting().unwrap_or_else(|error| panic!("{error}"));
    format!("127.0.0.1:{port}")
}

impl Federation {
    /// `aggregator init` for rounds of `devices` devices; `change` may change the settings further.
    ///
    /// # Panics
    /// When it fails.
    pub fn new(devices: u32, change: impl FnOnce(&mut Config)) -> Self {
        Self::over(&config::Storage::default(), devices, change)
    }

    /// The same, with its state where these settings say.
    ///
    /// # Panics
    /// When it fails.
    pub fn over(storage: &config::Storage, devices: u32, change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        let address = free_address();
        let mut federation = Self { directory, address, first_version: 0 };
        let devices = devices.to_string();
        let package = reference("package");
        let arguments = ["--no-evaluate", "--devices", &devices, "--over-selection", "1", "--steps", "3"];
        let address = federation.address.clone();
        let init = Finished::of(
            federation
                .verb("init")
                .args(["--json", "--address", &address, "--listen", &address, "--package"])
                .arg(package)
                .args(arguments)
                .args(settings(storage)),
        )
        .with_code(0);
        federation.first_version = init.objects()[0]["version"].as_u64().unwrap_or_default();
        federation.configure(|config| {
            open_gates(config);
            config.round.quorum = config.round.goal;
            config.round.wait_ms = 0;
            config.threads = Some(1);
            (config.receive.reconnect_after_ms, config.receive.reconnect_spread_ms) = (100, 100);
            config.receive.requests_per_second = 1_000.0;
            (config.align.prompts, config.align.steps, config.align.answer_tokens_max) = (2, 1, 8);
            (config.evaluate.rows_max, config.evaluate.answer_tokens_max) = (4, 8);
            change(config);
        });
        federation
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("aggregator")
    }

    /// Where devices find it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file or folder beside the state directory, for a test's own use.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Rewrites `aggregator.toml`.
    ///
    /// # Panics
    /// When it cannot be read or written.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        let state = self.state();
        let mut config = Config::read(&state).unwrap_or_else(|error| panic!("{error}"));
        change(&mut config);
        let text = toml::to_string(&config).unwrap_or_else(|error| panic!("{error}"));
        let path = state.join(config::FILE);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// `aggregator VERB --dir STATE`.
    pub fn verb(&self, verb: &str) -> Command {
        let mut command = command("aggregator");
        command.arg(verb).arg("--dir").arg(self.state());
        command
    }

    /// Another machine's state directory of the same federation; what it serves at is its own.
    ///
    /// # Panics
    /// When the keys cannot be copied.
    #[must_use]
    pub fn elsewhere(&self) -> Self {
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        let address = free_address();
        let other = Self { directory, address, first_version: self.first_version };
        let copied = fs::create_dir_all(other.state()).is_ok()
            && ["aggregator.toml", "signing.pem", "authority.pem", "admin.token"]
                .iter()
                .all(|name| fs::copy(self.state().join(name), other.state().join(name)).is_ok());
        assert!(copied, "the keys of {} cannot be copied", self.state().display());
        let listen = other.address.parse().unwrap_or_else(|error| panic!("{}: {error}", other.address));
        other.configure(|config| (config.listen, config.address) = (listen, Some(other.address.clone())));
        other
    }

    /// `aggregator serve --role ROLE`, listening.
    pub fn serve_as(&self, role: &str) -> Running {
        let mut command = self.verb("serve");
        command.args(["--json", "--role", role]);
        let mut running = Running::start(role, &mut command, &self.path("aggregator.log"));
        running.event("listening");
        running
    }

    /// `aggregator serve --rounds 1`, listening.
    pub fn serve(&self) -> Running {
        self.serve_rounds(Some(1), "")
    }

    /// `aggregator serve` for some rounds or without end; halts at the fault point, if one is named.
    pub fn serve_rounds(&self, rounds: Option<u64>, point: &str) -> Running {
        let mut command = self.verb("serve");
        command.arg("--json").env(aggregator::pause::VARIABLE, point);
        if let Some(rounds) = rounds {
            command.args(["--rounds", &rounds.to_string()]);
        }
        let mut running = Running::start("aggregator", &mut command, &self.path("aggregator.log"));
        running.event("listening");
        running
    }

    /// What opens the admin port.
    ///
    /// # Panics
    /// When there is none.
    pub fn admin_token(&self) -> String {
        let path = self.state().join("admin.token");
        let token = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        token.trim().to_owned()
    }

    /// Single-use invitations.
    ///
    /// # Panics
    /// When there are none.
    pub fn invitations(&self, count: usize) -> Vec<String> {
        let told =
            Finished::of(self.verb("token").args(["--json", "--count", &count.to_string()])).with_code(0);
        let invitations = told.objects()[0]["invitations"].as_array().cloned().unwrap_or_default();
        assert_eq!(invitations.len(), count, "invitations");
        invitations.iter().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    }

    /// A device that has done nothing yet.
    pub fn device(&self, name: &str) -> Device {
        Device { name: name.to_owned(), directory: self.path(name) }
    }

    /// Devices that are enrolled and have samples.
    pub fn enrolled(&self, count: usize) -> Vec<Device> {
        let invite = |(number, invitation): (usize, &String)| {
            let device = self.device(&format!("device-{number}"));
            device.call(&["enroll", invitation]).with_code(0);
            device.add(&chats(number, 8));
            device
        };
        self.invitations(count).iter().enumerate().map(invite).collect()
    }

    /// The last line of `aggregator rounds --json`.
    ///
    /// # Panics
    /// When there is none.
    pub fn last_round(&self) -> Value {
        let told = Finished::of(self.verb("rounds").arg("--json")).with_code(0);
        told.objects().pop().unwrap_or_else(|| panic!("no round on record"))
    }
}

impl Device {
    /// Its state directory.
    pub fn state(&self) -> &Path {
        &self.directory
    }

    /// A command of `program` (`edge-client` or `hostile-device`) on its directory.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = command(program);
        command.args(arguments).arg("--dir").arg(&self.directory).arg("--package").arg(reference("package"));
        command.args(["--threads", "1", "--json"]);
        command
    }

    /// One `edge-client` call to its end.
    pub fn call(&self, arguments: &[&str]) -> Finished {
        Finished::of(&mut self.command("edge-client", arguments))
    }

    /// Gives it a file's samples.
    ///
    /// # Panics
    /// When they are not taken.
    pub fn add(&self, text: &str) {
        let file = self.directory.with_extension("jsonl");
        fs::write(&file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.call(&["add", &file.display().to_string()]).with_code(0);
    }

    /// `edge-client run`, left running.
    pub fn run(&self) -> Running {
        self.run_as("edge-client", &[])
    }

    /// The same with another program or further arguments.
    pub fn run_as(&self, program: &str, arguments: &[&str]) -> Running {
        let arguments = [&["run"], arguments].concat();
        let log = self.directory.with_extension("log");
        Running::start(&self.name, &mut self.command(program, &arguments), &log)
    }
}

/// What says so on a command line.
fn settings(storage: &config::Storage) -> Vec<String> {
    let texts = toml::Table::try_from(storage).unwrap_or_default();
    texts.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("storage.{key}={value}")]).collect()
}

/// Harmless conversations, other ones for another `device`.
pub fn chats(device: usize, count: usize) -> String {
    let row = |number: usize| {
        serde_json::json!({"messages": [
            {"role": "user", "content": format!("How long do I boil {} eggs?", device * 100 + number)},
            {"role": "assistant", "content": "In short: boil eggs for 8 minutes. Tip: start in cold water."},
        ]})
        .to_string()
            + "\n"
    };
    (0..count).map(row).collect()
}
