//! A bucket of one's own: Moto's server, which speaks S3, on the loopback and in memory. `scripts/test` installs it from
//! PyPI; a machine without it has none.

use std::{
    env, fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aggregator::config;

use crate::{http, program::PATIENCE};

const NAME: &str = "federation";
const ANYBODY: &str = "Authorization: AWS4-HMAC-SHA256 Credential=anybody/20260101/us-east-1/s3/aws4_request, \
    SignedHeaders=host, Signature=0\r\n";

/// The server; it ends with this, and all objects with it.
#[derive(Debug)]
pub struct Bucket {
    address: String,
    server: Child,
}

impl Bucket {
    /// Starts one; none, said aloud, on a machine without the program.
    ///
    /// # Panics
    /// When it is there and does not work, or when `COMMONWEAL_REQUIRE_S3` is set and it is not there.
    pub fn start() -> Option<Self> {
        let python = env::var_os("COMMONWEAL_PYTHON").unwrap_or_else(|| "python3".into());
        let known = Command::new(&python).args(["-c", "import moto.server, flask"]).output();
        if !known.is_ok_and(|output| output.status.success()) {
            let skipped = "SKIPPED: no server that speaks S3 (python3 -m pip install 'moto[s3]')";
            assert!(env::var_os("COMMONWEAL_REQUIRE_S3").is_none(), "{skipped}");
            eprintln!("{skipped}");
            return None;
        }
        let address = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let address = address.unwrap_or_else(|error| panic!("no free port: {error}"));
        let mut command = Command::new(&python);
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &address.port().to_string()]);
        let server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let server = server.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let bucket = Self { address: address.to_string(), server };
        let end = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < end, "moto's server does not start");
            thread::sleep(Duration::from_millis(50));
        }
        bucket.put("", b"");
        Some(bucket)
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        let (address, length) = (&self.address, bytes.len());
        let head = format!("PUT /{NAME}{name} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n");
        // It asks for credentials, and takes any.
        let request = [head.as_bytes(), ANYBODY.as_bytes(), b"Connection: close\r\n\r\n", bytes].concat();
        let answer = http::exchange(&self.address, &request);
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// Puts other bytes in an object's place, as damage does.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn overwrite(&self, name: &str, bytes: &[u8]) {
        self.put(&format!("/{name}"), bytes);
    }

    /// Adds to settings of `[storage]` what reaches the bucket; the credentials' file lies in `folder`.
    ///
    /// # Panics
    /// When the file cannot be written.
    #[must_use]
    pub fn settings(&self, folder: &Path, storage: config::Storage) -> config::Storage {
        let credentials_file: PathBuf = folder.join("objects.credentials");
        let text = "access_key_id = \"federation\"\nsecret_access_key = \"as good as any on a loopback\"\n";
        let written = fs::write(&credentials_file, text)
            .and_then(|()| fs::set_permissions(&credentials_file, fs::Permissions::from_mode(0o600)));
        written.unwrap_or_else(|error| panic!("{}: {error}", credentials_file.display()));
        config::Storage {
            objects: Some(format!("s3://{NAME}/adapters")),
            endpoint: Some(format!("http://{}", self.address)),
            region: Some("us-east-1".to_owned()),
            credentials_file: Some(credentials_file),
            ..storage
        }
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // An ended child is no error here.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
