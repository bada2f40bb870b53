//! `aggregator dashboard`: the address of the dashboard, with the token behind its `#`, which no browser sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use serde_json::json;

use super::{CliError, say, say_json, settings};
use crate::config::Listen;
use crate::directory::Directory;

#[derive(Debug, clap::Args)]
pub(super) struct DashboardVerb {
    /// Where `serve` was told to listen for operators, if not by the file.
    #[arg(long, env = "COMMONWEAL_ADMIN", value_name = "ADDRESS:PORT")]
    admin: Option<Listen>,
}

pub(super) fn dashboard(
    dir: &Path,
    verb: &DashboardVerb,
    set: &[String],
    json: bool,
) -> Result<(), CliError> {
    let directory = Directory::open(dir)?;
    let listen = verb.admin.unwrap_or(settings::of(dir)?.with_set(set).formed()?.admin.listen);
    let Listen::At(address) = listen else {
        return Err(CliError::Input(
            "admin.listen: expected an address, got \"off\": there is no dashboard".to_owned(),
        ));
    };
    if address.port() == 0 {
        return Err(CliError::Input(
            "admin.listen: expected a port, got 0, which the system chooses anew at each start: give --admin what `serve` told"
                .to_owned(),
        ));
    }
    let url = format!("http://{}/#token={}", reachable(address), *directory.admin_token()?);
    if json {
        return say_json(&json!({ "url": url }));
    }
    say(&url);
    Ok(())
}

/// Every address of the machine is reached from it on the loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_reached_on_the_loopback() {
        let reach = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(reach("0.0.0.0:4434"), "127.0.0.1:4434");
        assert_eq!(reach("[::]:4434"), "[::1]:4434");
        assert_eq!(reach("192.0.2.7:9"), "192.0.2.7:9");
    }
}
