//! The aggregator's processes: one, or with `--fronts` several over a database that is started for them.

use std::path::{Path, PathBuf};

use aggregator::serve::Role;
use anyhow::{Context, Result};
use clap::ValueEnum as _;
use commonweal_tests::{
    child::Child,
    modelless::{self, Modelless},
    postgres::Postgres,
};

use crate::{
    Arguments,
    process::Used,
    serving::{self, Told},
    share::Share,
};

/// All that answers devices; it ends with this.
pub(super) struct Site {
    /// One for each device.
    pub(super) invitations: Vec<String>,
    /// Where devices may go.
    pub(super) ports: Vec<u16>,
    processes: Vec<Child>,
    // They end after their processes.
    shares: Vec<Share>,
    postgres: Option<Postgres>,
}

impl Site {
    pub(super) fn start(arguments: &Arguments, place: &Path) -> Result<Self> {
        let mut site = Self {
            invitations: Vec::new(),
            ports: Vec::new(),
            processes: Vec::new(),
            shares: Vec::new(),
            postgres: None,
        };
        let first = place.join("aggregator");
        if arguments.fronts == 0 {
            site.add(arguments, &first, Role::All)?;
            return Ok(site);
        }
        let postgres =
            Postgres::start().context("there is no PostgreSQL (Debian: apt-get install postgresql)")?;
        modelless::share(place, postgres.settings(place))?;
        site.postgres = Some(postgres);
        // Its keys, and the first release.
        drop(serving::open(arguments, &first)?);
        for number in 1..=arguments.fronts {
            let directory = if number == 1 { first.clone() } else { beside(&first, &number.to_string())? };
            site.add(arguments, &directory, Role::Front)?;
        }
        site.add(arguments, &beside(&first, "driver")?, Role::Drive)?;
        Ok(site)
    }

    fn add(&mut self, arguments: &Arguments, directory: &Path, role: Role) -> Result<()> {
        let numbers = [
            ("--devices", if self.invitations.is_empty() { arguments.devices } else { 1 }),
            ("--goal", arguments.goal()),
            ("--adapter-mb", arguments.adapter_mb),
        ];
        let numbers = numbers.iter().flat_map(|(name, number)| [(*name).to_owned(), number.to_string()]);
        let place = directory.to_str().context("a directory whose name is text")?.to_owned();
        let role_name = role.to_possible_value().context("a role with a name")?.get_name().to_owned();
        let mut process = Child::start(numbers.chain(["serve".to_owned(), place, role_name]))?;
        let Told { invitations, port } = process.hear()?;
        if self.invitations.is_empty() {
            self.invitations = invitations;
        }
        if role.receives() {
            self.ports.push(port);
        }
        if let (Role::Front, Some(cores)) = (role, arguments.front_cores) {
            self.shares.push(Share::of(process.id(), cores)?);
        }
        self.processes.push(process);
        Ok(())
    }

    /// What all of it took of the machine.
    pub(super) fn used(&self) -> Result<Used> {
        let mut all = Used::default();
        for process in &self.processes {
            all = all.and(&Used::of(process.id())?);
        }
        if let Some(postgres) = &self.postgres {
            all.database_seconds = postgres
                .processes()
                .into_iter()
                .filter_map(|id| Used::of(id).ok())
                .map(|used| used.cpu_seconds)
                .sum();
        }
        Ok(all)
    }
}

/// Another directory of the same federation.
fn beside(first: &Path, name: &str) -> Result<PathBuf> {
    let directory = first.with_file_name(format!("aggregator-{name}"));
    Modelless::copy_keys(first, &directory)?;
    Ok(directory)
}
