//! `[admin]` of the configuration: where the operator's port listens. `admin` serves it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The operator's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// An address, or `off`.
    pub listen: Listen,
    /// Whether `/metrics` needs the token, as all else does but `/healthz` and `/readyz`.
    pub metrics_token: bool,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: Listen::At(crate::admin::ADDRESS), metrics_token: true }
    }
}

/// Where to listen, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Listen {
    /// Nowhere.
    Off,
    /// On this address (TCP).
    At(SocketAddr),
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        match listen {
            Listen::Off => "off".to_owned(),
            Listen::At(address) => address.to_string(),
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(|_| format!("expected ADDRESS:PORT or \"off\", got \"{text}\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_somewhere_or_off() {
        let read = |text: &str| toml::from_str::<Admin>(text);
        assert_eq!(read("").unwrap(), Admin::default());
        assert_eq!(read("listen = \"off\"").unwrap().listen, Listen::Off);
        assert_eq!(read("listen = \"[::1]:9\"").unwrap().listen, Listen::At("[::1]:9".parse().unwrap()));
        let wrong = read("listen = \"of\"").unwrap_err().to_string();
        assert!(wrong.contains("expected ADDRESS:PORT or \"off\", got \"of\""), "{wrong}");
        for admin in [Admin::default(), Admin { listen: Listen::Off, metrics_token: false }] {
            assert_eq!(read(&toml::to_string(&admin).unwrap()).unwrap(), admin);
        }
    }
}
