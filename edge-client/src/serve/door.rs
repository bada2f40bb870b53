//! Who may ask: whoever calls this machine by a name that nobody else can give out, and knows the key if there is one.
//! No page of another site is let in: answers carry no CORS headers, and bodies must be JSON (`routes.rs`), which such a
//! page may not send unasked. Around all of `routes.rs`.

use std::net::IpAddr;

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, header},
    middleware::{self, Next},
    response::IntoResponse,
};

use super::refusals::Refusal;

/// The key that requests must name, kept as its hash: comparing hashes takes as long for one key as for another.
#[derive(Clone, Copy, Debug)]
pub struct Key(blake3::Hash);

impl Key {
    /// This key.
    pub fn new(key: &str) -> Self {
        Self(blake3::hash(key.as_bytes()))
    }

    fn opens(&self, headers: &HeaderMap) -> bool {
        let said = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let named = said
            .and_then(|said| said.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        named.is_some_and(|(_, key)| blake3::hash(key.trim().as_bytes()) == self.0)
    }
}

/// Answers only whoever may ask. A page that a browser shows may have its name point here (DNS rebinding): requests under
/// a name that is not this machine's are refused before anything else.
pub(super) fn guarded(app: Router, listen: IpAddr, key: Option<Key>) -> Router {
    app.layer(middleware::from_fn(move |request: Request, next: Next| async move {
        let headers = request.headers();
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        if !host.is_some_and(|host| is_this_host(host, listen)) {
            return Refusal::foreign_host().into_response();
        }
        if !key.is_none_or(|key| key.opens(headers)) {
            return Refusal::no_key().into_response();
        }
        next.run(request).await
    }))
}

/// Whether a `Host` is a name of the loopback or the address listened on. When that is every address of the machine, any
/// will do: an address, unlike a name, cannot be made to point elsewhere.
fn is_this_host(host: &str, listen: IpAddr) -> bool {
    let port_cut = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let name = port_cut.map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    match address.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || address == listen || listen.is_unspecified(),
        Err(_) => name.eq_ignore_ascii_case("localhost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn names_of_this_machine_are_told_from_others() {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "[::1]"] {
            assert!(is_this_host(host, loopback), "{host}");
        }
        for host in [
            "",
            "attacker.example",
            "attacker.example:8080",
            "localhost.attacker.example",
            "127.0.0.1.attacker.example",
            "localhost@attacker.example",
            "192.168.1.7:8080",
            "0.0.0.0",
            "[::1].attacker.example",
            "local host",
        ] {
            assert!(!is_this_host(host, loopback), "{host}");
        }
        let own = IpAddr::from([192, 168, 1, 7]);
        assert!(is_this_host("192.168.1.7:8080", own) && !is_this_host("192.168.1.8:8080", own));
        for all in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
            assert!(is_this_host("192.168.1.7:8080", all) && is_this_host("[2001:db8::7]", all));
            assert!(!is_this_host("attacker.example", all));
        }
    }

    #[test]
    fn a_key_opens_for_whoever_names_it() {
        let key = Key::new("secret");
        let opens = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            key.opens(&headers)
        };
        assert!(opens(Some("Bearer secret")) && opens(Some("bearer secret")));
        for bad in [None, Some("secret"), Some("Bearer "), Some("Bearer secret2"), Some("Basic secret")] {
            assert!(!opens(bad), "{bad:?}");
        }
    }
}
