//! The contract of [`Handler`] and [`Link`]: one suite, run over each carrier and with each handler. Behind the cargo
//! feature `contract`, for the tests of whoever implements one.
//!
//! ```text
//! commonweal_transport::contract_suite!(over_quic, MySubject, QuicMedium);
//! commonweal_transport::contract_suite!(in_memory, MySubject, SimMedium<MyHandler>);
//! ```
//!
//! A case panics where the contract is broken. Each begins with a fresh handler, authority and carrier.

#![expect(clippy::unwrap_used, reason = "a case of the suite fails by panicking")]

mod world;
mod identity;
mod upload;
mod fetch;
mod misbehaviour;

pub use fetch::*;
pub use identity::*;
pub use misbehaviour::*;
pub use upload::*;
pub use world::{Medium, QuicMedium, SimMedium, Subject, World};

#[cfg(doc)]
use crate::{Handler, Link};

/// Makes a module of tests, one for each case of the suite, for a [`Subject`] over a [`Medium`].
#[macro_export]
macro_rules! contract_suite {
    ($module:ident, $subject:ty, $medium:ty) => {
        $crate::contract_suite!(@cases $module, $subject, $medium,
            enrolling_yields_an_identity_that_is_served
            a_token_enrols_one_device
            an_unknown_token_is_refused
            a_malformed_signing_request_is_refused
            a_wrong_authority_pin_is_refused_and_spends_no_token
            a_device_of_another_authority_is_refused
            an_aggregator_of_another_authority_is_refused
            an_expired_certificate_is_refused
            a_certificate_that_ends_during_an_upload_gets_no_receipt
            renewing_keeps_the_device
            a_revoked_device_is_refused
            a_device_revoked_while_it_uploads_gets_no_receipt
            an_update_is_received_and_signed_for
            a_cut_upload_goes_on_where_it_was
            the_same_update_again_gets_the_same_receipt
            two_uploads_of_one_update_at_once_get_one_receipt
            a_stale_round_is_refused
            an_update_that_is_not_as_announced_is_refused
            a_payload_other_than_its_announcement_is_not_sent
            chunks_that_do_not_fit_are_refused
            published_content_is_fetched
            a_partial_download_goes_on_where_it_was
            a_damaged_partial_download_is_fetched_anew
            unknown_content_is_refused
            an_oversized_frame_is_refused
            garbage_is_refused_and_others_are_served
            messages_out_of_place_are_refused
            a_peer_that_stands_still_is_dropped
        );
    };
    (@cases $module:ident, $subject:ty, $medium:ty, $($case:ident)*) => {
        mod $module {
            #[allow(unused_imports, reason = "the types may be named by path")]
            use super::*;

            $(
                #[tokio::test]
                async fn $case() {
                    $crate::contract::$case::<$subject, $medium>().await;
                }
            )*
        }
    };
}
