//! The carrier in memory: the same frames between the same `session` and the same `serve`, the same certificates judged
//! by the same verifiers, and faults on demand. No sockets, no encryption. Neighbours: `faults` decides what goes wrong;
//! `quic` is the real one.

mod faults;
mod proxy;

pub use faults::{Fault, FaultRates, Faults, Injected};

use crate::{
    Clock, Credentials, Handler, IdentityError, LinkError, Peer, ServeLimits, ServerIdentity, certificate,
    serve::Service,
    tls::{self, PinnedAuthority},
    wire::{Purpose, Stream, Wire},
};
use commonweal_protocol::Digest;
use proxy::Proxy;
use rustls::{client::danger::ServerCertVerifier, server::danger::ClientCertVerifier};
use rustls_pki_types::CertificateDer;
use std::{
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::io::DuplexStream;
use tokio_util::task::TaskTracker;

/// Bytes in flight in each direction of a stream.
const PIPE_BYTES: usize = 256 << 10;

/// An aggregator and the network around it.
pub struct SimNetwork<H> {
    service: Service<H>,
    identity: ServerIdentity,
    devices: Arc<dyn ClientCertVerifier>,
    clock: Clock,
    faults: Faults,
    down: AtomicBool,
    tasks: TaskTracker,
}

/// A device's way into a [`SimNetwork`].
pub struct SimWire<H> {
    network: Arc<SimNetwork<H>>,
    identity: Mutex<Identity>,
}

#[derive(Clone)]
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    aggregator: Arc<dyn ServerCertVerifier>,
}

impl<H: Handler> SimNetwork<H> {
    /// An aggregator with this handler. To be used within a tokio runtime.
    pub fn new(
        handler: H,
        identity: ServerIdentity,
        clock: Clock,
        limits: &ServeLimits,
        faults: Faults,
    ) -> Result<Arc<Self>, IdentityError> {
        let devices = tls::device_verifier(identity.authority())?;
        let service = Service::new(handler, clock.clone(), limits);
        let (down, tasks) = (AtomicBool::new(false), TaskTracker::new());
        Ok(Arc::new(Self { service, identity, devices, clock, faults, down, tasks }))
    }

    /// Takes the network away from everybody, or gives it back. Streams that are open go on.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Waits until nothing is under way: no stream open, no duplicate on its way.
    pub async fn settle(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }

    /// A device's way in.
    pub fn device(self: &Arc<Self>, credentials: Credentials) -> Result<SimWire<H>, IdentityError> {
        Ok(SimWire { network: Arc::clone(self), identity: Mutex::new(Identity::device(credentials)?) })
    }

    /// The way in of a device that enrols, which knows the authority by its digest.
    pub fn enrolment(self: &Arc<Self>, authority: Digest) -> SimWire<H> {
        let identity = Identity { chain: Vec::new(), aggregator: Arc::new(PinnedAuthority::new(authority)) };
        SimWire { network: Arc::clone(self), identity: Mutex::new(identity) }
    }

    /// The handshake: each side judges the other's certificates. None is a device that enrols.
    fn shake_hands(&self, device: &Identity) -> Result<Option<Peer>, LinkError> {
        let now = self.clock.tls_time();
        let (own, others) = self.identity.chain.split_first().unzip();
        let (own, others) = own.zip(others).ok_or_else(|| IdentityError::certificate("none was given"))?;
        device
            .aggregator
            .verify_server_cert(own, others, &tls::server_name()?, &[], now)
            .map_err(|error| LinkError::Untrusted { reason: error.to_string() })?;
        let Some((own, others)) = device.chain.split_first() else { return Ok(None) };
        self.devices
            .verify_client_cert(own, others, now)
            .map_err(|error| LinkError::CertificateRefused { reason: error.to_string() })?;
        let peer = certificate::peer(&device.chain);
        peer.map(Some).map_err(|error| LinkError::CertificateRefused { reason: error.to_string() })
    }

    /// Serves one stream; also called for a duplicate of one.
    async fn serve(
        &self,
        peer: Option<Peer>,
        sending: impl tokio::io::AsyncWrite + Unpin + Send,
        receiving: impl tokio::io::AsyncRead + Unpin + Send,
    ) {
        match peer {
            // In memory a connection costs nothing: one of who is shut out may stay.
            Some(peer) => {
                self.service.device(&peer, sending, receiving).await;
            }
            None => self.service.enrolment(sending, receiving).await,
        }
    }
}

impl Identity {
    fn device(credentials: Credentials) -> Result<Self, IdentityError> {
        let aggregator = tls::aggregator_verifier(credentials.authority())?;
        Ok(Self { chain: credentials.into_chain(), aggregator })
    }
}

impl<H: Handler> SimWire<H> {
    /// Takes a renewed certificate.
    pub fn replace(&self, credentials: Credentials) -> Result<(), IdentityError> {
        let identity = Identity::device(credentials)?;
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }
}

impl<H: Handler> Wire for SimWire<H> {
    type Sending = DuplexStream;
    type Receiving = DuplexStream;

    async fn open(&self, _: Purpose) -> Result<Stream<DuplexStream, DuplexStream>, LinkError> {
        let network = &self.network;
        if network.down.load(Ordering::SeqCst) {
            let source = io::Error::new(io::ErrorKind::NetworkUnreachable, "the simulated network is down");
            return Err(LinkError::Unreachable { address: "the simulated aggregator".to_owned(), source });
        }
        let identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let peer = network.shake_hands(&identity)?;
        let (sending, from_device) = tokio::io::duplex(PIPE_BYTES);
        let (to_device, receiving) = tokio::io::duplex(PIPE_BYTES);
        let (to_server, server_receiving) = tokio::io::duplex(PIPE_BYTES);
        let (server_sending, from_server) = tokio::io::duplex(PIPE_BYTES);
        let proxy = Proxy::new(network.faults.clone());
        let forward = proxy.clone().forward(from_device, to_server);
        let backward = proxy.backward(from_server, to_device);
        let serving = Arc::clone(network);
        network.tasks.spawn(async move { serving.serve(peer, server_sending, server_receiving).await });
        network.tasks.spawn(backward);
        let duplicating = Arc::clone(network);
        network.tasks.spawn(async move {
            if let Some(ghost) = forward.await {
                duplicating.serve(peer, tokio::io::sink(), io::Cursor::new(ghost)).await;
            }
        });
        Ok(Stream { sending, receiving, guard: None })
    }
}

impl<H> fmt::Debug for SimNetwork<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimNetwork").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl<H> fmt::Debug for SimWire<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimWire").field("network", &self.network).finish_non_exhaustive()
    }
}
