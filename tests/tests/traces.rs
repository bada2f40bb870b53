//! From a release back to the devices that it came of, by what a collector was sent: the real programs, and a collector that
//! decodes with OpenTelemetry's own definitions.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{collections::BTreeSet, net::TcpListener};

use commonweal_tests::{
    collector::{Collector, Taken, text},
    federation::{Device, Federation},
};
use opentelemetry_proto::tonic::trace::v1::Span;

const AGGREGATOR: &str = "commonweal-aggregator";
const DEVICE: &str = "commonweal-device";

fn spans<'s>(taken: &'s [Taken], service: &str, name: &str) -> Vec<&'s Span> {
    taken.iter().filter(|(of, span)| of == service && span.name == name).map(|(_, span)| span).collect()
}

/// The span at this place.
fn at<'s>(taken: &'s [Taken], trace: &[u8], span: &[u8]) -> Option<&'s Taken> {
    taken.iter().find(|(_, at)| at.trace_id == trace && at.span_id == span)
}

/// A device that takes part in one round, with or without an endpoint for its spans.
fn take_part(device: &Device, endpoint: Option<&str>) {
    let mut arguments = vec!["run", "--rounds", "1"];
    arguments.extend(endpoint.map(|endpoint| ["--traces", endpoint]).into_iter().flatten());
    device.call(&arguments).with_code(0);
}

#[test]
fn from_a_release_links_lead_to_each_update_and_to_the_device_that_consented() {
    let (operators, owners) = (Collector::start(), Collector::start());
    let federation = Federation::new(2, |config| config.traces.endpoint = Some(operators.endpoint.clone()));
    let mut aggregator = federation.serve();
    let devices = federation.enrolled(2);
    std::thread::scope(|scope| {
        scope.spawn(|| take_part(&devices[0], Some(&owners.endpoint)));
        scope.spawn(|| take_part(&devices[1], None));
    });
    let published = aggregator.event("published");
    assert_eq!(aggregator.finish(), 0);

    // Both ends have flushed by now; what the owner's collector has is put beside it, as one collector for both would.
    let (ours, theirs) = (operators.spans(), owners.spans());
    let version = published["version"].to_string();
    let publish = spans(&ours, AGGREGATOR, "publish");
    let publish =
        publish.iter().find(|span| text(&span.attributes, "commonweal.release.version") == version).unwrap();
    let root = at(&ours, &publish.trace_id, &publish.parent_span_id).unwrap();
    assert_eq!(
        (root.1.name.as_str(), text(&root.1.attributes, "commonweal.outcome").as_str()),
        ("round", "published")
    );
    for stage in ["merge", "align", "evaluate", "publish"] {
        let stages = spans(&ours, AGGREGATOR, stage);
        assert_eq!(stages.len(), 1, "{stage}");
        assert_eq!(
            (&stages[0].trace_id, &stages[0].parent_span_id),
            (&publish.trace_id, &root.1.span_id),
            "{stage}"
        );
    }
    let merge = spans(&ours, AGGREGATOR, "merge")[0];
    assert_eq!(merge.links.len(), 2);
    let mut consented = 0;
    let mut who = BTreeSet::new();
    for link in &merge.links {
        let (service, receive) = at(&ours, &link.trace_id, &link.span_id).unwrap();
        assert_eq!((service.as_str(), receive.name.as_str()), (AGGREGATOR, "receive"));
        assert_eq!(text(&receive.attributes, "commonweal.outcome"), "accepted");
        assert_eq!(text(&receive.attributes, "commonweal.update.digest").len(), 64);
        who.insert(text(&receive.attributes, "commonweal.device"));
        for link in &receive.links {
            let (service, upload) = at(&theirs, &link.trace_id, &link.span_id).unwrap();
            assert_eq!((service.as_str(), upload.name.as_str()), (DEVICE, "upload"));
            consented += 1;
            let update = at(&theirs, &upload.trace_id, &upload.parent_span_id).unwrap();
            assert_eq!((update.1.name.as_str(), update.1.parent_span_id.len()), ("update", 0));
            for stage in ["sample", "filter", "revise", "train", "compress", "upload"] {
                let stages = spans(&theirs, DEVICE, stage);
                assert_eq!(stages.len(), 1, "{stage}");
                assert_eq!(
                    (&stages[0].trace_id, &stages[0].parent_span_id),
                    (&upload.trace_id, &update.1.span_id)
                );
                assert!(stages[0].start_time_unix_nano >= update.1.start_time_unix_nano, "{stage}");
                assert!(stages[0].end_time_unix_nano <= upload.end_time_unix_nano, "{stage}");
            }
        }
    }
    assert_eq!((who.len(), consented), (2, 1), "two devices, one of which wanted to be followed");
    // A device says when it did what, and for which round; nothing else.
    for (_, span) in &theirs {
        let says: Vec<&str> = span.attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        assert_eq!((says, span.events.len()), (vec!["commonweal.round"], 0), "{}", span.name);
    }
}

#[test]
fn a_collector_that_is_away_or_never_answers_stops_no_round() {
    // Takes connections and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for endpoint in [format!("http://{nobody}"), format!("http://{}", mute.local_addr().unwrap())] {
        let federation = Federation::new(1, |config| config.traces.endpoint = Some(endpoint.clone()));
        let mut aggregator = federation.serve_rounds(None, "");
        let device = &federation.enrolled(1)[0];
        take_part(device, Some(&endpoint));
        aggregator.event("published");
        assert_eq!(aggregator.stop(), 0);
        let log = std::fs::read_to_string(federation.path("aggregator.log")).unwrap();
        assert_eq!(log.matches("traces: no spans reach").count(), 1, "{log}");
    }
}

#[test]
fn the_environment_of_other_programs_names_the_endpoint_for_an_aggregator_and_for_no_device() {
    let collector = Collector::start();
    let federation = Federation::new(1, |_| ());
    let config = |command: &mut std::process::Command| {
        let shown = commonweal_tests::program::Finished::of(command.args(["--json"])).with_code(0);
        shown.objects().into_iter().find(|setting| setting["key"] == "traces.endpoint")
    };
    assert_eq!(config(&mut federation.verb("config")), None, "off by default");
    let otel = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let named = config(federation.verb("config").env(otel, &collector.endpoint)).unwrap();
    assert_eq!((&named["value"], &named["source"]), (&collector.endpoint.clone().into(), &otel.into()));
    let flag =
        config(federation.verb("config").env(otel, &collector.endpoint).args(["--traces", "http://other:1"]));
    assert_eq!(flag.unwrap()["value"], "http://other:1");
    let mut bad = federation.verb("serve");
    let refused = commonweal_tests::program::Finished::of(bad.env(otel, "https://other:1")).with_code(3);
    assert!(refused.stderr.contains("traces.endpoint: expected http://HOST:PORT"), "{}", refused.stderr);

    let aggregator = federation.serve_rounds(None, "");
    let device = &federation.enrolled(1)[0];
    let mut command = device.command("edge-client", &["run", "--rounds", "1"]);
    commonweal_tests::program::Finished::of(command.env(otel, &collector.endpoint)).with_code(0);
    assert!(collector.spans().is_empty(), "a device sends spans only where its owner says");
    // Nor what others tell their own collectors with them.
    let mut command =
        device.command("edge-client", &["run", "--rounds", "1", "--traces", &collector.endpoint]);
    command.env("OTEL_EXPORTER_OTLP_HEADERS", "api-key=of-another");
    commonweal_tests::program::Finished::of(&mut command).with_code(0);
    assert_eq!(aggregator.stop(), 0);
    let headers = collector.headers();
    assert!(!collector.spans().is_empty() && headers.iter().any(|line| line.starts_with("host: ")));
    assert!(!headers.iter().any(|line| line.contains("of-another")), "{headers:?}");
}
