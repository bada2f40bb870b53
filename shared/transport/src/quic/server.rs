//! The aggregator's end of QUIC: accepts connections within limits, learns who is there, hands streams to `serve`.
//! Neighbours: `serve` answers; `authority` issued the certificate.

use super::{code, socket, source::Source, transport};
use crate::{
    ALPN, ALPN_ENROLMENT, Clock, Handler, IdentityError, Peer, ServeLimits, ServerIdentity, certificate,
    limits::{
        CONNECTION_WINDOW_BYTES, HANDSHAKES_OVER_RETRY, INCOMING_BYTES_MAX, STRANGER_WINDOW_BYTES,
        STREAMS_MAX,
    },
    seats::{Seat, Seats},
    serve::{Service, chain},
    tls,
};
use commonweal_protocol::DeviceId;
use quinn::{
    Connection, Endpoint, EndpointConfig, Incoming, RecvStream, SendStream, VarInt,
    crypto::rustls::{HandshakeData, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Connections of one device at once: one for questions, one that transfers, and those that a cut left behind.
const CONNECTIONS_OF_A_DEVICE_MAX: usize = 8;

/// The part of all handshakes, of all enrolments and of all connections turned away that one address may hold: it takes eight to shut others out.
const SHARE_OF_AN_ADDRESS: usize = 8;

/// How long a close waits for requests under way, and then for peers to hear of it.
const CLOSE_WAIT: Duration = Duration::from_secs(3);

/// Why the server does not listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Its own certificate.
    #[error("the aggregator's certificate cannot be used")]
    Identity(#[from] IdentityError),
    /// The socket.
    #[error("the socket cannot be opened")]
    Socket(#[from] io::Error),
}

/// A listening aggregator. Dropping it without [`QuicServer::close`] cuts its connections.
#[derive(Debug)]
pub struct QuicServer {
    endpoint: Endpoint,
    local: SocketAddr,
    clock: Clock,
    limits: ServeLimits,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl QuicServer {
    /// Listens on a UDP address and serves both ALPNs until closed. Must be called inside a tokio runtime.
    pub fn bind<H: Handler>(
        address: SocketAddr,
        identity: ServerIdentity,
        handler: H,
        limits: ServeLimits,
        clock: Clock,
    ) -> Result<Self, BindError> {
        let config = config(identity, &clock, &limits)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let socket = socket::bind(address)?;
        let endpoint = Endpoint::new(EndpointConfig::default(), Some(config), socket, runtime)?;
        let local = endpoint.local_addr()?;
        let server = Arc::new(Server::new(handler, &clock, &limits));
        let (stop, tasks) = (server.stop.clone(), server.tasks.clone());
        tasks.spawn(server.accept(endpoint.clone()));
        Ok(Self { endpoint, local, clock, limits, stop, tasks })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Connections that are open, of devices and of strangers.
    pub fn connections(&self) -> usize {
        self.endpoint.open_connections()
    }

    /// Uses another certificate for connections from now on; those that are open go on.
    pub fn reload(&self, identity: ServerIdentity) -> Result<(), IdentityError> {
        self.endpoint.set_server_config(Some(config(identity, &self.clock, &self.limits)?));
        Ok(())
    }

    /// Takes no more requests, gives those under way a moment to end, and ends every connection.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(CLOSE_WAIT, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "closing while requests are under way");
        }
        self.endpoint.close(code::DONE, b"the aggregator stops");
        if tokio::time::timeout(CLOSE_WAIT, self.endpoint.wait_idle()).await.is_err() {
            tracing::debug!("some peers did not hear of the close in time");
        }
    }
}

impl Drop for QuicServer {
    fn drop(&mut self) {
        self.stop.cancel();
        self.endpoint.close(code::DONE, b"");
    }
}

fn config(
    identity: ServerIdentity,
    clock: &Clock,
    limits: &ServeLimits,
) -> Result<quinn::ServerConfig, IdentityError> {
    let mut transport = transport(limits.stall_ms, limits.congestion)?;
    transport
        .receive_window(VarInt::from_u32(STRANGER_WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX));
    let tls = QuicServerConfig::try_from(tls::server_config(identity, clock)?)
        .map_err(|error| IdentityError::certificate(error.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(limits.connections_max)
        .incoming_buffer_size(64 << 10)
        .incoming_buffer_size_total(INCOMING_BYTES_MAX);
    Ok(config)
}

/// Seats for connections of one stream: so many, and so many of one address.
struct Room {
    all: Semaphore,
    of: Seats<Source>,
}

impl Room {
    fn new(seats: usize) -> Self {
        Self { all: Semaphore::new(seats), of: share_of(seats) }
    }
}

fn share_of(seats: usize) -> Seats<Source> {
    Seats::new((seats / SHARE_OF_AN_ADDRESS).max(1))
}

struct Server<H> {
    service: Service<H>,
    window: Duration,
    /// Handshakes of addresses that may be forged, in a pool of their own: nobody can use up another's share by sending
    /// in its name.
    unproven: Semaphore,
    proven: Semaphore,
    proven_of: Seats<Source>,
    connections: Semaphore,
    connections_of: Seats<DeviceId>,
    enrolments: Room,
    /// For devices that are shut out.
    turned_away: Room,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl<H: Handler> Server<H> {
    fn new(handler: H, clock: &Clock, limits: &ServeLimits) -> Self {
        let proven_max = limits.handshakes_before_retry.max(1) * HANDSHAKES_OVER_RETRY;
        Self {
            service: Service::new(handler, clock.clone(), limits),
            window: Duration::from_millis(limits.stall_ms),
            unproven: Semaphore::new(limits.handshakes_before_retry),
            proven: Semaphore::new(proven_max),
            proven_of: share_of(proven_max),
            connections: Semaphore::new(limits.connections_max),
            connections_of: Seats::new(CONNECTIONS_OF_A_DEVICE_MAX),
            enrolments: Room::new(limits.enrolments_max),
            turned_away: Room::new(limits.enrolments_max),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        loop {
            let incoming = tokio::select! {
                incoming = endpoint.accept() => incoming,
                () = self.stop.cancelled() => None,
            };
            let Some(incoming) = incoming else { break };
            self.tasks.spawn(Arc::clone(&self).welcome(incoming));
        }
    }

    async fn welcome(self: Arc<Self>, incoming: Incoming) {
        let address = incoming.remote_address();
        let Some(connection) = self.shake_hands(incoming).await else { return };
        let protocol = connection
            .handshake_data()
            .and_then(|data| data.downcast::<HandshakeData>().ok())
            .and_then(|data| data.protocol);
        match protocol.as_deref() {
            Some(ALPN) => match identify(&connection) {
                Ok(peer) => self.serve_device(&connection, peer).await,
                Err(error) => {
                    tracing::info!(%address, error = %chain(&error), "connection without a device's certificate");
                    connection.close(code::NO_IDENTITY, b"");
                }
            },
            Some(ALPN_ENROLMENT) => self.serve_enrolment(&connection).await,
            // rustls refuses a handshake that agrees on no protocol.
            _ => connection.close(code::NO_IDENTITY, b""),
        }
    }

    async fn shake_hands(&self, incoming: Incoming) -> Option<Connection> {
        if incoming.remote_address_validated() {
            let seat = self.proven_of.take(incoming.remote_address().into());
            let (Some(_seat), Ok(_slot)) = (seat, self.proven.try_acquire()) else {
                incoming.refuse();
                return None;
            };
            self.shake(incoming).await
        } else {
            let Ok(_slot) = self.unproven.try_acquire() else {
                // Always possible: what has been retried is either proven or has ended.
                let _ = incoming.retry();
                return None;
            };
            self.shake(incoming).await
        }
    }

    async fn shake(&self, incoming: Incoming) -> Option<Connection> {
        let address = incoming.remote_address();
        let shaken = async { incoming.accept()?.await };
        match tokio::time::timeout(self.window, shaken).await {
            Ok(Ok(connection)) => Some(connection),
            Ok(Err(error)) => {
                tracing::info!(%address, error = %chain(&error), "handshake failed");
                None
            }
            Err(_) => {
                tracing::info!(%address, "handshake stalled");
                None
            }
        }
    }

    async fn serve_device(self: &Arc<Self>, connection: &Connection, peer: Peer) {
        if self.service.is_shut_out(&peer).await {
            return self.turn_away(connection, peer).await;
        }
        let (Ok(_slot), Some(_seat)) =
            (self.connections.try_acquire(), self.connections_of.take(peer.device))
        else {
            tracing::info!(device = %peer.device, "too many connections");
            connection.close(code::BUSY, b"");
            return;
        };
        connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES));
        loop {
            let stream = tokio::select! {
                stream = connection.accept_bi() => stream,
                () = self.stop.cancelled() => break,
            };
            let (mut sending, receiving) = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::debug!(device = %peer.device, %error, "connection ended");
                    break;
                }
            };
            let (server, held) = (Arc::clone(self), connection.clone());
            // Not cancelled when the connection goes: what the handler has begun, it ends.
            self.tasks.spawn(async move {
                let may_ask_more = server.service.device(&peer, &mut sending, receiving).await;
                // Once the answer is acknowledged; a connection that nobody holds is closed at once.
                let _ = tokio::time::timeout(server.window, sending.stopped()).await;
                if !may_ask_more {
                    held.close(code::DONE, b"");
                }
            });
        }
    }

    /// A device that is shut out gets one answer, which says why, and no seat among those that are.
    async fn turn_away(&self, connection: &Connection, peer: Peer) {
        let Some((_seats, (mut sending, receiving))) = self.one_stream(&self.turned_away, connection).await
        else {
            return;
        };
        self.service.device(&peer, &mut sending, receiving).await;
        let _ = tokio::time::timeout(self.window, sending.stopped()).await;
        connection.close(code::DONE, b"");
    }

    async fn serve_enrolment(&self, connection: &Connection) {
        let Some((_seats, (mut sending, receiving))) = self.one_stream(&self.enrolments, connection).await
        else {
            return;
        };
        self.service.enrolment(&mut sending, receiving).await;
        let _ = tokio::time::timeout(self.window, sending.stopped()).await;
        connection.close(code::DONE, b"");
    }

    /// The one stream of a connection that gets no more, if there are seats and it comes in time.
    async fn one_stream<'s>(
        &self,
        room: &'s Room,
        connection: &Connection,
    ) -> Option<((Seat<'s, Source>, SemaphorePermit<'s>), (SendStream, RecvStream))> {
        // A handshake that came to its end proves the address.
        let source = connection.remote_address().into();
        let (Some(seat), Ok(slot)) = (room.of.take(source), room.all.try_acquire()) else {
            tracing::info!(address = %connection.remote_address(), "too many connections of strangers");
            connection.close(code::BUSY, b"");
            return None;
        };
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(1));
        let Ok(Ok(stream)) = tokio::time::timeout(self.window, connection.accept_bi()).await else {
            connection.close(code::DONE, b"");
            return None;
        };
        Some(((seat, slot), stream))
    }
}

fn identify(connection: &Connection) -> Result<Peer, IdentityError> {
    let chain =
        connection.peer_identity().and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    certificate::peer(&chain.unwrap_or_default())
}
