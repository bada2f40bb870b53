//! A PostgreSQL server of one's own, on the loopback and in a temporary directory: what the tests of the stores and
//! `scale-out` run on. `scripts/test` installs Debian's package where it can; a machine without the programs has none.

use std::{
    env, fs,
    net::TcpListener,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aggregator::config;
use tempfile::TempDir;

use crate::program::PATIENCE;

const USER: &str = "commonweal";
const DATABASE: &str = "federation";
const PASSWORD: &str = "as good as any on a loopback";

/// The server; it ends with this.
#[derive(Debug)]
pub struct Postgres {
    directory: TempDir,
    programs: PathBuf,
    /// Whom it runs as: it refuses to be root.
    account: Option<(u32, u32)>,
    port: u16,
    server: Option<Child>,
}

/// Where the programs are: on the path, or where Debian puts them; the newest version.
fn programs() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    versions.sort();
    let mut folders = env::split_paths(&path).chain(versions.into_iter().rev());
    folders.find(|folder| {
        ["initdb", "postgres", "psql", "pg_dump"].iter().all(|name| folder.join(name).is_file())
    })
}

/// An account that is not root, if this process is.
fn account() -> Option<(u32, u32)> {
    let is_root = fs::metadata("/proc/self").is_ok_and(|about| {
        use std::os::unix::fs::MetadataExt as _;
        about.uid() == 0
    });
    if !is_root {
        return None;
    }
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    ["postgres:", "nobody:"].iter().find_map(|name| {
        let line = accounts.lines().find(|line| line.starts_with(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

impl Postgres {
    /// Starts a fresh one; none, said aloud, on a machine without the programs.
    ///
    /// # Panics
    /// When there are programs and they do not work, or when `COMMONWEAL_REQUIRE_POSTGRES` is set and there are none.
    pub fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            let skipped = "SKIPPED: no PostgreSQL on this machine (Debian: apt-get install postgresql)";
            assert!(env::var_os("COMMONWEAL_REQUIRE_POSTGRES").is_none(), "{skipped}");
            eprintln!("{skipped}");
            return None;
        };
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = port.unwrap_or_else(|error| panic!("no free port: {error}")).port();
        let mut postgres = Self { directory, programs, account: account(), port, server: None };
        postgres.initialize();
        postgres.run();
        Some(postgres)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// One of its programs, with its password, as its account.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.env("PGPASSWORD", PASSWORD).stdin(Stdio::null());
        if let Some((user, group)) = self.account {
            command.uid(user).gid(group);
        }
        command.current_dir("/");
        command
    }

    fn initialize(&self) {
        let password = self.path("password");
        let write = || {
            fs::write(&password, PASSWORD)?;
            fs::set_permissions(&password, fs::Permissions::from_mode(0o600))?;
            if let Some((user, group)) = self.account {
                chown(&password, Some(user), Some(group))?;
                chown(self.directory.path(), Some(user), Some(group))?;
            }
            Ok::<_, std::io::Error>(())
        };
        write().unwrap_or_else(|error| panic!("{}: {error}", password.display()));
        let arguments = ["--no-sync", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "-U", USER];
        let mut initdb = self.command("initdb");
        initdb.args(arguments).arg("--pwfile").arg(&password).arg("-D").arg(self.path("data"));
        finish(&mut initdb);
    }

    /// Starts it, and makes the database if it is not there.
    fn run(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log"));
        let log = log.unwrap_or_else(|error| panic!("the log of PostgreSQL: {error}"));
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.path("data")).args(["-p", &self.port.to_string()]);
        command.arg("-c").arg(format!("unix_socket_directories={}", self.directory.path().display()));
        for setting in ["listen_addresses=127.0.0.1", "max_connections=200", "shared_buffers=32MB"] {
            command.args(["-c", setting]);
        }
        let server = command.stdout(Stdio::null()).stderr(log).spawn();
        self.server = Some(server.unwrap_or_else(|error| panic!("{command:?}: {error}")));
        let end = Instant::now() + PATIENCE;
        while !self.is_ready() {
            let ended = self.server.as_mut().and_then(|server| server.try_wait().ok().flatten());
            assert!(ended.is_none() && Instant::now() < end, "PostgreSQL does not start: {}", self.log());
            thread::sleep(Duration::from_millis(50));
        }
        let there = self.ask("postgres", &format!("SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"));
        if there.is_empty() {
            self.ask("postgres", &format!("CREATE DATABASE {DATABASE}"));
        }
    }

    fn is_ready(&self) -> bool {
        let mut psql = self.psql("postgres");
        psql.args(["-c", "SELECT 1"]).output().is_ok_and(|output| output.status.success())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn psql(&self, database: &str) -> Command {
        let mut command = self.command("psql");
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &self.url_of(database)]);
        command
    }

    fn ask(&self, database: &str, sql: &str) -> String {
        finish(self.psql(database).args(["-c", sql]))
    }

    /// Does something in the database, and gives what it printed.
    ///
    /// # Panics
    /// When it is refused.
    pub fn sql(&self, sql: &str) -> String {
        self.ask(DATABASE, sql)
    }

    /// Another, empty database of this server; its URL.
    pub fn database(&self, name: &str) -> String {
        self.ask("postgres", &format!("CREATE DATABASE {name}"));
        self.url_of(name)
    }

    fn url_of(&self, database: &str) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/{database}", self.port)
    }

    /// Its database's URL, without the password.
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// What opens it; settings of `[storage]`.
    ///
    /// # Panics
    /// When the password's file cannot be written.
    pub fn settings(&self, folder: &Path) -> config::Storage {
        let password_file = folder.join("database.password");
        let written = fs::write(&password_file, PASSWORD)
            .and_then(|()| fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600)));
        written.unwrap_or_else(|error| panic!("{}: {error}", password_file.display()));
        config::Storage {
            coordination: Some(self.url()),
            password_file: Some(password_file),
            ..config::Storage::default()
        }
    }

    /// The server's processes: the first, and one for each session and chore.
    pub fn processes(&self) -> Vec<u32> {
        let Some(first) = self.server.as_ref().map(Child::id) else { return Vec::new() };
        let children = fs::read_to_string(format!("/proc/{first}/task/{first}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok());
        std::iter::once(first).chain(children).collect()
    }

    /// Has it speak TLS with this certificate and key (PEM).
    ///
    /// # Panics
    /// When it does not take them.
    pub fn secure(&self, certificate: &str, key: &str) {
        for (name, text) in [("server.crt", certificate), ("server.key", key)] {
            let path = self.path("data").join(name);
            let write = || {
                fs::write(&path, text)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
                self.account.map_or(Ok(()), |(user, group)| chown(&path, Some(user), Some(group)))
            };
            write().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        self.sql("ALTER SYSTEM SET ssl = on");
        self.sql("SELECT pg_reload_conf()");
        let end = Instant::now() + PATIENCE;
        while self.sql("SHOW ssl") != "on" {
            assert!(Instant::now() < end, "PostgreSQL takes no certificate: {}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it in an instant, as a machine that loses its power, and starts it again on what it had written.
    ///
    /// # Panics
    /// When it does not come back.
    pub fn crash(&mut self) {
        self.end("QUIT");
        self.run();
    }

    fn end(&mut self, signal: &str) {
        let Some(mut server) = self.server.take() else { return };
        drop(Command::new("kill").args(["-s", signal, &server.id().to_string()]).status());
        drop(server.wait());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.end("QUIT");
    }
}

/// Runs a command to its end, and gives what it printed.
///
/// # Panics
/// When it fails.
pub fn finish(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
