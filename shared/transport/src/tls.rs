//! Who trusts whom: TLS 1.3 only, ring named explicitly, the authority's certificate the only root, time injected, no
//! resumption and no 0-RTT (a resumed session would carry on an identity past its certificate).
//! Neighbours: `quic` puts these configurations under QUIC; `sim` asks the same verifiers directly.

use crate::{Clock, Credentials, IdentityError, authority::ServerIdentity};
use commonweal_protocol::Digest;
use rustls::{
    DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;

/// ALPN of devices with a certificate.
pub const ALPN: &[u8] = b"commonweal/1";

/// ALPN of devices that enrol.
pub const ALPN_ENROLMENT: &[u8] = b"commonweal-enroll/1";

/// The name in the aggregator's certificate. Not its address: the aggregator may move, and trust comes from the
/// authority, which certifies one aggregator.
pub(crate) const SERVER_NAME: &str = "aggregator.commonweal";

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn server_name() -> Result<ServerName<'static>, IdentityError> {
    ServerName::try_from(SERVER_NAME).map_err(|error| IdentityError::certificate(error.to_string()))
}

fn roots(authority: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, IdentityError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned())?;
    Ok(Arc::new(roots))
}

/// Judges devices' certificates. A device may show none (it enrols); the carrier refuses that on the other ALPN.
pub(crate) fn device_verifier(
    authority: &CertificateDer<'_>,
) -> Result<Arc<dyn ClientCertVerifier>, IdentityError> {
    WebPkiClientVerifier::builder_with_provider(roots(authority)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| IdentityError::certificate(error.to_string()))
}

/// Judges the aggregator's certificate by the authority's.
pub(crate) fn aggregator_verifier(
    authority: &CertificateDer<'_>,
) -> Result<Arc<WebPkiServerVerifier>, IdentityError> {
    WebPkiServerVerifier::builder_with_provider(roots(authority)?, provider())
        .build()
        .map_err(|error| IdentityError::certificate(error.to_string()))
}

/// Configuration of the aggregator: both ALPNs on one port.
pub(crate) fn server_config(
    identity: ServerIdentity,
    clock: &Clock,
) -> Result<rustls::ServerConfig, IdentityError> {
    let verifier = device_verifier(identity.authority())?;
    let mut config = rustls::ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = vec![ALPN.to_vec(), ALPN_ENROLMENT.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// Configuration of a device that has its certificate.
pub(crate) fn device_config(
    credentials: Credentials,
    clock: &Clock,
) -> Result<rustls::ClientConfig, IdentityError> {
    let verifier = aggregator_verifier(credentials.authority())?;
    let key = credentials.key().for_tls();
    let mut config = rustls::ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(credentials.into_chain(), key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Configuration of a device that enrols: it knows the authority's certificate by its digest only.
pub(crate) fn enrolment_config(
    authority: Digest,
    clock: &Clock,
) -> Result<rustls::ClientConfig, IdentityError> {
    let mut config = rustls::ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority::new(authority)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_ENROLMENT.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Trusts the authority whose certificate has this digest: the server must send it in its chain, and its own
/// certificate is then judged by it in the ordinary way.
#[derive(Debug)]
pub(crate) struct PinnedAuthority {
    authority: Digest,
    provider: Arc<CryptoProvider>,
}

impl PinnedAuthority {
    pub(crate) fn new(authority: Digest) -> Self {
        Self { authority, provider: provider() }
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|certificate| Digest::of(certificate) == self.authority);
        let pinned = pinned.ok_or_else(|| {
            rustls::Error::General("its authority is not the one of the invitation".to_owned())
        })?;
        aggregator_verifier(pinned)
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
