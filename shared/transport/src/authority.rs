//! The certificate authority of one federation, made by `aggregator init`: issues the aggregator's own certificate and
//! the devices' short-lived ones. Neighbours: the aggregator's handler calls it to enrol and renew; `tls` trusts it.
//!
//! Device certificates can only be clients and the aggregator's only a server, so that neither passes for the other.
//! Time is an argument. Revocation is the handler's (`Handler::admit`), asked at every request.

use crate::{
    IdentityError,
    certificate::{DEVICE_URI, read},
    identity::{only, parts, push},
    tls::SERVER_NAME,
};
use commonweal_protocol::{CertificateChain, Csr, DeviceId, Digest, Opaque};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// How long before its issue a certificate is already valid, for devices whose clock is slow.
const BACKDATED_MS: u64 = 5 * 60 * 1000;

/// How long the authority's certificate is valid: ten years.
const AUTHORITY_LIFE_MS: u64 = 10 * 365 * 24 * 3600 * 1000;

const KEY_TAG: &str = "PRIVATE KEY";
const CERTIFICATE_TAG: &str = "CERTIFICATE";

/// The authority: its certificate and its private key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    not_after_ms: u64,
}

/// The aggregator's certificate and key for TLS. Issued anew at every start, and again while running (see
/// `QuicServer::reload`).
pub struct ServerIdentity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Authority {
    /// A new authority with a new key (ECDSA P-256).
    pub fn create(now_ms: u64) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(IdentityError::Key)?;
        let mut params = params(now_ms, AUTHORITY_LIFE_MS, u64::MAX, "commonweal authority")?;
        params.serial_number = Some(serial(key.der_bytes(), now_ms));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(IdentityError::Issue)?.der().clone();
        Self::assemble(certificate, key)
    }

    fn assemble(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, IdentityError> {
        let facts = read(&certificate)?;
        if !facts.has_key(key.public_key_raw()) {
            return Err(IdentityError::certificate("the authority's is not for the key beside it"));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(IdentityError::Issue)?;
        Ok(Self { issuer, certificate, not_after_ms: facts.not_after_ms })
    }

    /// One PEM text with the key and the certificate. It is the federation's greatest secret.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::new());
        push(&mut text, KEY_TAG, self.issuer.key().serialized_der());
        push(&mut text, CERTIFICATE_TAG, &self.certificate);
        text
    }

    /// Reads what [`Authority::to_pem`] wrote.
    pub fn from_pem(text: &str) -> Result<Self, IdentityError> {
        let parts = parts(text)?;
        let key = PrivatePkcs8KeyDer::from(only(&parts, KEY_TAG, "one private key")?);
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(IdentityError::Key)?;
        let certificate = only(&parts, CERTIFICATE_TAG, "one certificate")?;
        Self::assemble(CertificateDer::from(certificate.to_vec()), key)
    }

    /// BLAKE3 of the authority's certificate: what an invitation pins.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.certificate)
    }

    /// A certificate and a fresh key for the aggregator itself.
    pub fn issue_server(&self, now_ms: u64, life_ms: u64) -> Result<ServerIdentity, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(IdentityError::Key)?;
        let mut params = params(now_ms, life_ms, self.not_after_ms, "commonweal aggregator")?;
        params.serial_number = Some(serial(key.der_bytes(), now_ms));
        params.subject_alt_names = vec![SanType::DnsName(text(SERVER_NAME)?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(IdentityError::Issue)?;
        Ok(ServerIdentity {
            chain: vec![certificate.der().clone(), self.certificate.clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }

    /// A device's certificate for the key of this request, and the authority's. The names, key usages and basic
    /// constraints that the request asks for are ignored. Refused: a request that is malformed, not signed by its own key,
    /// or asks for any other extension, and keys other than ECDSA P-256 and Ed25519.
    pub fn issue_device(
        &self,
        csr: &Csr,
        device: DeviceId,
        now_ms: u64,
        life_ms: u64,
    ) -> Result<CertificateChain, IdentityError> {
        let refused = |reason: String| IdentityError::Csr { reason };
        let der = CertificateSigningRequestDer::from(csr.to_vec());
        let mut request =
            CertificateSigningRequestParams::from_der(&der).map_err(|error| refused(error.to_string()))?;
        let algorithm = request.public_key.algorithm();
        if *algorithm != rcgen::PKCS_ECDSA_P256_SHA256 && *algorithm != rcgen::PKCS_ED25519 {
            return Err(refused("expected an ECDSA P-256 or an Ed25519 key".to_owned()));
        }
        request.params = params(now_ms, life_ms, self.not_after_ms, "commonweal device")?;
        request.params.serial_number = Some(serial(request.public_key.der_bytes(), now_ms));
        request.params.subject_alt_names = vec![SanType::URI(text(&format!("{DEVICE_URI}{device}"))?)];
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = request.signed_by(&self.issuer).map_err(IdentityError::Issue)?;
        let ders = [certificate.der(), &self.certificate];
        let chain = ders.map(|der| {
            Opaque::new(der.to_vec()).map_err(|error| IdentityError::certificate(error.to_string()))
        });
        Ok(CertificateChain(chain.into_iter().collect::<Result<_, _>>()?))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.digest())
    }
}

impl fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerIdentity({} certificates)", self.chain.len())
    }
}

impl ServerIdentity {
    pub(crate) fn authority(&self) -> &CertificateDer<'static> {
        // Made by `issue_server` only, with two.
        self.chain.last().unwrap_or(&self.chain[0])
    }
}

fn params(now_ms: u64, life_ms: u64, end_ms: u64, name: &str) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::default();
    params.not_before = moment(now_ms.saturating_sub(BACKDATED_MS))?;
    params.not_after = moment(now_ms.saturating_add(life_ms).min(end_ms))?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn moment(unix_ms: u64) -> Result<OffsetDateTime, IdentityError> {
    let seconds = i64::try_from(unix_ms / 1000).map_err(|_| IdentityError::Time)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| IdentityError::Time)
}

/// A serial number from what the certificate is for: 16 bytes, positive, different for another key or moment.
fn serial(public_key: &[u8], now_ms: u64) -> SerialNumber {
    let mut hasher = blake3::Hasher::new_derive_key("commonweal certificate serial v1");
    hasher.update(&now_ms.to_le_bytes()).update(public_key);
    let mut serial = [0; 16];
    hasher.finalize_xof().fill(&mut serial);
    serial[0] = serial[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&serial)
}

fn text(name: &str) -> Result<rcgen::string::Ia5String, IdentityError> {
    name.try_into().map_err(IdentityError::Issue)
}
