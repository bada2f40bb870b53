//! The one string that an operator hands to a device: where the aggregator is, how to know it, and the token.
//! `commonweal://HOST:PORT/?token=HEX&ca=HEX`. Neighbours: `aggregator token` prints it, `edge-client enroll` reads it.

use crate::{Digest, IdentifierError, Token, bounds};
use std::{fmt, str::FromStr};

const SCHEME: &str = "commonweal://";

/// Where to enrol and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    /// The aggregator's host.
    pub host: Host,
    /// Its UDP port.
    pub port: u16,
    /// The single-use token.
    pub token: Token,
    /// BLAKE3 of the authority's DER certificate.
    pub authority: Digest,
}

/// A DNS name or an IP address (an IPv6 address without its brackets); nothing else fits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host(String);

/// Why a text is not an invitation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvitationError {
    /// Another scheme.
    #[error("invitation: expected it to start with {SCHEME}")]
    Scheme,
    /// No `/?` after host and port.
    #[error("invitation: expected HOST:PORT/?token=…&ca=…")]
    Shape,
    /// Not a host.
    #[error(
        "invitation: expected a host name or an IP address of at most {} characters",
        bounds::HOST_CHARACTERS_MAX
    )]
    Host,
    /// Not a port.
    #[error("invitation: expected a port from 1 to 65535")]
    Port,
    /// The token or the authority's digest is missing, twice there or malformed.
    #[error("invitation: expected one {name} of 64 hex digits")]
    Field {
        /// Which one.
        name: &'static str,
        /// What is wrong with it, if it is there.
        #[source]
        source: Option<IdentifierError>,
    },
    /// A field that is not known.
    #[error("invitation: expected only the fields token and ca")]
    UnknownField,
}

impl Host {
    /// The host as resolvers take it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_ipv6(&self) -> bool {
        self.0.contains(':')
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Host {
    type Err = InvitationError;
    fn from_str(text: &str) -> Result<Self, InvitationError> {
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let fits = (1..=bounds::HOST_CHARACTERS_MAX).contains(&text.len())
            && (text.chars().all(name) || text.parse::<std::net::Ipv6Addr>().is_ok());
        if fits { Ok(Self(text.to_owned())) } else { Err(InvitationError::Host) }
    }
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.is_ipv6() { ("[", "]") } else { ("", "") };
        let Self { host, port, token, authority } = self;
        write!(f, "{SCHEME}{open}{host}{close}:{port}/?token={}&ca={authority}", token.reveal())
    }
}

impl FromStr for Invitation {
    type Err = InvitationError;
    fn from_str(text: &str) -> Result<Self, InvitationError> {
        let rest = text.trim().strip_prefix(SCHEME).ok_or(InvitationError::Scheme)?;
        let (place, query) = rest.split_once("/?").ok_or(InvitationError::Shape)?;
        let (host, port) = place.rsplit_once(':').ok_or(InvitationError::Port)?;
        let port = port.parse().ok().filter(|&port| port > 0).ok_or(InvitationError::Port)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host: Host = bracketed.unwrap_or(host).parse()?;
        if host.is_ipv6() != bracketed.is_some() {
            return Err(InvitationError::Host);
        }
        let (mut token, mut authority) = (None, None);
        for field in query.split('&') {
            match field.split_once('=') {
                Some(("token", hex)) => set("token", &mut token, hex)?,
                Some(("ca", hex)) => set("ca", &mut authority, hex)?,
                _ => return Err(InvitationError::UnknownField),
            }
        }
        let missing = |name| InvitationError::Field { name, source: None };
        Ok(Self {
            host,
            port,
            token: token.ok_or(missing("token"))?,
            authority: authority.ok_or(missing("ca"))?,
        })
    }
}

fn set<T: FromStr<Err = IdentifierError>>(
    name: &'static str,
    slot: &mut Option<T>,
    hex: &str,
) -> Result<(), InvitationError> {
    let value = hex.parse().map_err(|source| InvitationError::Field { name, source: Some(source) })?;
    if slot.replace(value).is_some() {
        return Err(InvitationError::Field { name, source: None });
    }
    Ok(())
}
