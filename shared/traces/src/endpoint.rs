//! Where a collector listens, as settings name it.

use std::{fmt, str::FromStr};

/// The port of OTLP over HTTP.
const PORT: u16 = 4318;
const TRACES: &str = "/v1/traces";
/// What names an endpoint elsewhere, and what of its value is not the base; the first that is set counts.
const VARIABLES: [(&str, &str); 2] =
    [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", TRACES), ("OTEL_EXPORTER_OTLP_ENDPOINT", "")];

/// `http://HOST[:PORT][/PATH]`. Plain HTTP: a collector is on this machine or on a network that is trusted, and sends on
/// from there as it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
    path: String,
}

impl Endpoint {
    /// Host and port, to connect to; IPv6 without its brackets.
    pub(crate) fn address(&self) -> (&str, u16) {
        (self.host.trim_start_matches('[').trim_end_matches(']'), self.port)
    }

    /// Where spans are posted.
    pub(crate) fn traces(&self) -> String {
        format!("{self}{TRACES}")
    }

    /// The endpoint that the environment names for any program with OpenTelemetry, and the variable that does.
    pub fn named(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, String)> {
        VARIABLES.into_iter().find_map(|(name, suffix)| {
            let text = variable(name).filter(|text| !text.trim().is_empty())?;
            let base = text.trim();
            Some((name, base.strip_suffix(suffix).unwrap_or(base).to_owned()))
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, path } = self;
        write!(f, "http://{host}:{port}{path}")
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Not with the text itself: there may be a password in it.
        let wrong =
            || "expected http://HOST:PORT of a collector, without a name, a password or a query".to_owned();
        let uri: http::Uri = text.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
        if uri.scheme_str() != Some("http") || uri.query().is_some() {
            return Err(wrong());
        }
        // What stands before the host is a name and a password; what stands behind it must be a port.
        let behind = uri.authority().and_then(|authority| authority.as_str().strip_prefix(host));
        let port = match behind.ok_or_else(wrong)? {
            "" => PORT,
            port => port.strip_prefix(':').and_then(|port| port.parse().ok()).ok_or_else(wrong)?,
        };
        let path = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { host: host.to_owned(), port, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_plain_address() {
        let read = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.traces());
        assert_eq!(read("http://127.0.0.1:4318").unwrap(), "http://127.0.0.1:4318/v1/traces");
        assert_eq!(read("http://collector/").unwrap(), "http://collector:4318/v1/traces");
        assert_eq!(read("http://[::1]:9/a/").unwrap(), "http://[::1]:9/a/v1/traces");
        assert_eq!("http://[::1]:9".parse::<Endpoint>().unwrap().address(), ("::1", 9));
        for text in [
            "",
            "collector:4318",
            "https://h:1",
            "http://",
            "http://h:x",
            "http://me:word@h:1",
            "http://h/?a",
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains("expected http://HOST:PORT") && !told.contains("word@"), "{text}: {told}");
        }
    }

    #[test]
    fn the_environments_own_variable_for_traces_comes_first() {
        let named = |set: &[(&str, &str)]| {
            let find =
                |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            Endpoint::named(find)
        };
        let (all, traces) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        assert_eq!(named(&[]), None);
        assert_eq!(named(&[(all, " ")]), None);
        assert_eq!(named(&[(all, "http://a:1 ")]), Some((all, "http://a:1".to_owned())));
        let both = named(&[(all, "http://a:1"), (traces, "http://b:2/v1/traces")]);
        assert_eq!(both, Some((traces, "http://b:2".to_owned())));
    }
}
