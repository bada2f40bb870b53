//! A device's end of QUIC: connects when a stream is wanted, keeps one connection for questions and one for the transfer
//! under way, tells why a connection ended. Neighbours: `session` opens streams here; `path` looks after their way.

use super::{
    KEEP_ALIVE, code,
    path::{self, LookedAfter},
    socket::Sockets,
    transport,
};
use crate::{
    Clock, Credentials, DeviceKey, IdentityError, LinkError, LinkLimits, Meter, QuicLink, Session,
    tls::{self, SERVER_NAME},
    wire::{Purpose, Stream, Wire},
};
use commonweal_protocol::{Digest, Invitation};
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, ReadError, TokioRuntime, WriteError,
    crypto::rustls::QuicClientConfig,
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex as SyncMutex, PoisonError},
    time::Duration,
};
use tokio::sync::Mutex;

/// QUIC from a device to its aggregator.
#[derive(Debug)]
pub struct QuicWire {
    host: String,
    port: u16,
    clock: Clock,
    limits: LinkLimits,
    sockets: Sockets,
    configs: SyncMutex<Configs>,
    questions: Mutex<Option<Connected>>,
    /// The transfer under way, to rebind.
    transfer: SyncMutex<Option<Connected>>,
}

#[derive(Debug, Clone)]
struct Configs {
    question: ClientConfig,
    transfer: ClientConfig,
}

#[derive(Debug, Clone)]
pub(super) struct Connected {
    pub(super) endpoint: Endpoint,
    pub(super) connection: Connection,
    /// The address that the system sends from, when it was last looked at.
    pub(super) from: Arc<SyncMutex<Option<IpAddr>>>,
}

/// Closes a transfer's connection with its stream, and its keep-alive with it.
struct CloseWithStream(Connection);

impl Drop for CloseWithStream {
    fn drop(&mut self) {
        self.0.close(code::DONE, b"");
    }
}

/// Spends an invitation: proves nothing but the token, trusts the authority that the invitation pins, and comes back
/// with a device's credentials.
pub async fn enroll(
    invitation: &Invitation,
    key: DeviceKey,
    limits: &LinkLimits,
    clock: &Clock,
) -> Result<Credentials, LinkError> {
    let (host, port) = (invitation.host.as_str(), invitation.port);
    let wire = QuicWire::enrolment(host, port, invitation.authority, clock, limits)?;
    let enrolled = Session::over(wire, *limits).enroll(invitation.token, key.csr()?).await?;
    Ok(Credentials::new(key, &enrolled, invitation.authority)?)
}

impl QuicLink {
    /// A link to the aggregator at `host:port`, as the device of these credentials. Connects when first asked.
    pub fn new(
        host: &str,
        port: u16,
        credentials: Credentials,
        limits: LinkLimits,
        clock: Clock,
    ) -> Result<Self, LinkError> {
        Ok(Self::over(QuicWire::device(host, port, credentials, clock, &limits)?, limits))
    }

    /// The same, whose sockets are counted, and which moves only what its meter allows.
    pub fn metered(
        host: &str,
        port: u16,
        credentials: Credentials,
        limits: LinkLimits,
        clock: Clock,
        meter: Arc<dyn Meter>,
    ) -> Result<Self, LinkError> {
        let mut wire = QuicWire::device(host, port, credentials, clock, &limits)?;
        wire.sockets.meter = Some(meter);
        Ok(Self::over(wire, limits))
    }

    /// Moves to fresh sockets at once, for whoever knows that the device's network has changed; transfers go on over them.
    /// A link does so by itself, some seconds after nothing comes any more.
    pub async fn rebind(&self) -> io::Result<()> {
        self.wire().rebind().await
    }
}

impl QuicWire {
    /// For a device that has its certificate.
    pub fn device(
        host: &str,
        port: u16,
        credentials: Credentials,
        clock: Clock,
        limits: &LinkLimits,
    ) -> Result<Self, IdentityError> {
        Self::new(host, port, tls::device_config(credentials, &clock)?, clock, limits)
    }

    /// For a device that enrols, which knows the authority by its digest.
    pub fn enrolment(
        host: &str,
        port: u16,
        authority: Digest,
        clock: &Clock,
        limits: &LinkLimits,
    ) -> Result<Self, IdentityError> {
        Self::new(host, port, tls::enrolment_config(authority, clock)?, clock.clone(), limits)
    }

    fn new(
        host: &str,
        port: u16,
        tls: rustls::ClientConfig,
        clock: Clock,
        limits: &LinkLimits,
    ) -> Result<Self, IdentityError> {
        Ok(Self {
            host: host.to_owned(),
            port,
            clock,
            limits: *limits,
            sockets: Sockets::default(),
            configs: SyncMutex::new(Configs::new(tls, limits)?),
            questions: Mutex::new(None),
            transfer: SyncMutex::new(None),
        })
    }

    /// Takes a renewed certificate, for the connections to come.
    pub async fn replace(&self, credentials: Credentials) -> Result<(), IdentityError> {
        let configs = Configs::new(tls::device_config(credentials, &self.clock)?, &self.limits)?;
        *self.configs.lock().unwrap_or_else(PoisonError::into_inner) = configs;
        self.let_go().await;
        Ok(())
    }

    /// Moves what is connected to a new socket at once.
    pub async fn rebind(&self) -> io::Result<()> {
        let transfer = self.transfer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let questions = self.questions.lock().await.clone();
        for Connected { endpoint, connection, .. } in transfer.into_iter().chain(questions) {
            endpoint.rebind_abstract(self.sockets.towards(connection.remote_address())?)?;
        }
        Ok(())
    }

    async fn connect(&self, purpose: Purpose) -> Result<Connected, LinkError> {
        let config = {
            let configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
            match purpose {
                Purpose::Question => configs.question.clone(),
                Purpose::Transfer => configs.transfer.clone(),
            }
        };
        let place = (self.host.as_str(), self.port);
        let remotes = tokio::net::lookup_host(place).await.map_err(|source| self.unreachable(source))?;
        let mut last = self.unreachable(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        for remote in remotes {
            match self.connect_to(remote, config.clone()).await {
                Ok(connected) => return Ok(connected),
                // Another address of the same name may be reachable; one that answers wrongly is an answer.
                Err(error @ LinkError::Unreachable { .. }) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    async fn connect_to(&self, remote: SocketAddr, config: ClientConfig) -> Result<Connected, LinkError> {
        let socket = self.sockets.towards(remote).map_err(|source| self.unreachable(source))?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, socket, runtime)
            .map_err(|source| self.unreachable(source))?;
        let connecting = endpoint
            .connect_with(config, remote, SERVER_NAME)
            .map_err(|error| self.unreachable(io::Error::other(error)))?;
        let window = Duration::from_millis(self.limits.stall_ms);
        match tokio::time::timeout(window, connecting).await {
            Ok(Ok(connection)) => {
                let from = Arc::new(SyncMutex::new(path::from(remote)));
                Ok(Connected { endpoint, connection, from })
            }
            Ok(Err(error)) => Err(match ended("connecting", error) {
                LinkError::Cut { source, .. } => self.unreachable(source),
                other => other,
            }),
            Err(_) => Err(self.unreachable(io::ErrorKind::TimedOut.into())),
        }
    }

    fn unreachable(&self, source: io::Error) -> LinkError {
        LinkError::Unreachable { address: format!("{}:{}", self.host, self.port), source }
    }

    async fn question(&self) -> Result<Connected, LinkError> {
        let mut kept = self.questions.lock().await;
        if let Some(connected) = kept.as_ref().filter(|it| it.connection.close_reason().is_none()) {
            return Ok(connected.clone());
        }
        Ok(kept.insert(self.connect(Purpose::Question).await?).clone())
    }
}

impl Wire for QuicWire {
    type Sending = quinn::SendStream;
    type Receiving = quinn::RecvStream;

    async fn open(
        &self,
        purpose: Purpose,
    ) -> Result<Stream<quinn::SendStream, quinn::RecvStream>, LinkError> {
        let (connected, closing) = match purpose {
            Purpose::Question => (self.question().await?, None),
            Purpose::Transfer => {
                let connected = self.connect(purpose).await?;
                *self.transfer.lock().unwrap_or_else(PoisonError::into_inner) = Some(connected.clone());
                let closing = CloseWithStream(connected.connection.clone());
                (connected, Some(closing))
            }
        };
        let connection = connected.connection.clone();
        let looked_after = LookedAfter::new(connected, self.sockets.clone());
        let (sending, receiving) =
            connection.open_bi().await.map_err(|error| ended("opening a stream", error))?;
        Ok(Stream { sending, receiving, guard: Some(Box::new((looked_after, closing))) })
    }

    async fn let_go(&self) {
        if let Some(connected) = self.questions.lock().await.take() {
            connected.connection.close(code::DONE, b"");
        }
    }

    fn meter(&self) -> Option<&dyn Meter> {
        self.sockets.meter.as_deref()
    }

    fn explain(&self, during: &'static str, error: io::Error) -> LinkError {
        let read = error.get_ref().and_then(|inner| inner.downcast_ref::<ReadError>());
        let written = error.get_ref().and_then(|inner| inner.downcast_ref::<WriteError>());
        match (read, written) {
            (Some(ReadError::ConnectionLost(cause)), _) | (_, Some(WriteError::ConnectionLost(cause))) => {
                ended(during, cause.clone())
            }
            _ => LinkError::Cut { during, source: error },
        }
    }
}

impl Configs {
    fn new(tls: rustls::ClientConfig, limits: &LinkLimits) -> Result<Self, IdentityError> {
        let tls =
            QuicClientConfig::try_from(tls).map_err(|error| IdentityError::certificate(error.to_string()))?;
        let mut question = ClientConfig::new(Arc::new(tls));
        let mut transfer = question.clone();
        question.transport_config(Arc::new(transport(limits.stall_ms, limits.congestion)?));
        let mut alive = transport(limits.stall_ms, limits.congestion)?;
        alive.keep_alive_interval(Some(KEEP_ALIVE));
        transfer.transport_config(Arc::new(alive));
        Ok(Self { question, transfer })
    }
}

/// What it means that a connection ended so.
fn ended(during: &'static str, error: ConnectionError) -> LinkError {
    match &error {
        // The aggregator's TLS said no: in this protocol that is about the device's certificate.
        ConnectionError::ConnectionClosed(close) => {
            if let Some(reason) = alert(close.error_code.into()) {
                return LinkError::CertificateRefused { reason: reason.to_owned() };
            }
        }
        ConnectionError::ApplicationClosed(close) if close.error_code == code::NO_IDENTITY => {
            return LinkError::CertificateRefused { reason: "it names no device".to_owned() };
        }
        // Our own TLS said no: that is about the aggregator's certificate.
        ConnectionError::TransportError(failure) if is_tls(failure.code.into()) => {
            return LinkError::Untrusted { reason: failure.reason.clone() };
        }
        _ => {}
    }
    LinkError::Cut { during, source: io::Error::new(io::ErrorKind::ConnectionAborted, error) }
}

/// QUIC carries TLS alerts as 0x100 and the alert (RFC 9001, 4.8).
fn is_tls(code: u64) -> bool {
    code & !0xff == 0x100
}

/// The alerts that are about a certificate (RFC 8446, 6.2).
fn alert(code: u64) -> Option<&'static str> {
    if !is_tls(code) {
        return None;
    }
    match code & 0xff {
        42 => Some("bad certificate"),
        43 => Some("unsupported certificate"),
        44 => Some("certificate revoked"),
        45 => Some("certificate expired"),
        46 => Some("certificate not acceptable"),
        48 => Some("certificate of an unknown authority"),
        49 => Some("access denied"),
        51 => Some("certificate badly signed"),
        116 => Some("certificate required"),
        _ => None,
    }
}
