//! The one thread that answers: takes requests from a queue, lets them join the batch of their adapter
//! (`commonweal_runtime::Together`), and sends each what is said to it. Whoever has gone is dropped between two steps.
//! `routes.rs` asks it.

use std::collections::BTreeMap;

use commonweal_runtime::{
    Cancel, GenerateOptions, Generated, InferError, Model, PreparedAdapter, Prompt, Said, Spoken, Ticket,
    Together,
};
use tokio::{
    runtime::Handle,
    sync::{
        Notify,
        mpsc::{Receiver, Sender},
    },
};

/// One prompt, and who waits for its answers.
#[derive(Debug)]
pub(super) struct Job {
    /// Which of the adapters.
    pub(super) adapter: usize,
    pub(super) prompt: Prompt,
    pub(super) options: GenerateOptions,
    /// Answers to it.
    pub(super) answers: usize,
    pub(super) alternatives: Option<usize>,
    /// The number of the first answer among those of the request.
    pub(super) first: usize,
    /// Has room for all that can be said ([`replies_max`]), so that a slow reader keeps nobody else waiting.
    pub(super) replies: Sender<Reply>,
}

/// What becomes of an answer.
#[derive(Debug)]
pub(super) enum Reply {
    /// The prompt is being read.
    Begun,
    Text {
        answer: usize,
        text: String,
    },
    Token {
        answer: usize,
        token: Spoken,
    },
    Ended {
        answer: usize,
        generated: Generated,
    },
    /// There will be no answer, and nothing more to any of the request.
    Failed(InferError),
    /// There will be no answer: the network failed for all, or the endpoint ends.
    Lost,
}

/// The most replies to a prompt: one as it begins; for each token its text and itself; at the end what was held back,
/// and the end.
pub(super) fn replies_max(options: &GenerateOptions, answers: usize) -> usize {
    1 + answers * (2 * options.max_new_tokens + 2)
}

/// Who waits under a ticket.
struct Waiting {
    replies: Sender<Reply>,
    first: usize,
    /// Answers that have not ended.
    left: usize,
}

/// How the thread is told to end.
#[derive(Debug, Default)]
pub(super) struct End {
    cancel: Cancel,
    told: Notify,
}

impl End {
    /// Ends what is under way, and the thread.
    pub(super) fn now(&self) {
        self.cancel.cancel();
        self.told.notify_one();
    }
}

/// Answers until it is told to end. `handle` is the runtime's that the queue is filled from.
pub(super) fn answer(
    model: &Model,
    adapters: &[PreparedAdapter],
    mut jobs: Receiver<Job>,
    end: &End,
    handle: &Handle,
) {
    let mut batches: Vec<Together<'_>> =
        adapters.iter().map(|adapter| Together::new(model, adapter)).collect();
    let mut waiting: BTreeMap<Ticket, Waiting> = BTreeMap::new();
    let mut next = Ticket(0);
    // The first in the queue, if its batch is still reading another.
    let mut held: Option<Job> = None;
    loop {
        let is_idle = batches.iter().all(Together::is_idle);
        let job = match held.take() {
            Some(job) => Some(job),
            None if is_idle => handle.block_on(async {
                tokio::select! {
                    job = jobs.recv() => job,
                    () = end.told.notified() => None,
                }
            }),
            None => jobs.try_recv().ok(),
        };
        match job {
            Some(job) if !batches[job.adapter].takes_more() => held = Some(job),
            Some(job) => {
                next = Ticket(next.0 + 1);
                begin(&mut batches[job.adapter], next, job, &mut waiting);
            }
            None => {}
        }
        drop_gone(&mut batches, &mut waiting);
        for batch in batches.iter_mut().filter(|batch| !batch.is_idle()) {
            let stepped =
                batch.step(&end.cancel, &mut |ticket, answer, said| tell(&mut waiting, ticket, answer, said));
            if let Err(error) = stepped {
                // What is under way shares one run of the network: it fails together.
                batch.clear();
                fail_all(&mut waiting, &error);
            }
        }
        if end.cancel.is_cancelled() {
            for (_, waiting) in waiting {
                let _ = waiting.replies.try_send(Reply::Lost);
            }
            return;
        }
    }
}

fn begin(batch: &mut Together<'_>, ticket: Ticket, job: Job, waiting: &mut BTreeMap<Ticket, Waiting>) {
    let Job { prompt, options, answers, alternatives, first, replies, .. } = job;
    // Whoever did not wait for a place costs nothing.
    if replies.is_closed() {
        return;
    }
    match batch.ask(ticket, &prompt, &options, answers, alternatives) {
        Ok(()) => {
            let _ = replies.try_send(Reply::Begun);
            waiting.insert(ticket, Waiting { replies, first, left: answers });
        }
        Err(error) => {
            let _ = replies.try_send(Reply::Failed(error));
        }
    }
}

/// Forgets whoever has gone away.
fn drop_gone(batches: &mut [Together<'_>], waiting: &mut BTreeMap<Ticket, Waiting>) {
    waiting.retain(|ticket, one| {
        let is_gone = one.replies.is_closed();
        if is_gone {
            for batch in batches.iter_mut() {
                batch.leave(*ticket);
            }
        }
        !is_gone
    });
}

/// The channel has room for every reply, so that sending fails only where nobody listens any more.
fn tell(waiting: &mut BTreeMap<Ticket, Waiting>, ticket: Ticket, answer: usize, said: Said<'_>) {
    let Some(one) = waiting.get_mut(&ticket) else { return };
    let answer = one.first + answer;
    let (reply, is_end) = match said {
        Said::Text(text) => (Reply::Text { answer, text: text.to_owned() }, false),
        Said::Token(token) => (Reply::Token { answer, token }, false),
        Said::Ended(generated) => (Reply::Ended { answer, generated }, true),
        Said::Failed(error) => (Reply::Failed(error), true),
    };
    let _ = one.replies.try_send(reply);
    one.left -= usize::from(is_end);
    if one.left == 0 {
        waiting.remove(&ticket);
    }
}

fn fail_all(waiting: &mut BTreeMap<Ticket, Waiting>, error: &InferError) {
    if !matches!(error, InferError::Cancelled) {
        tracing::error!("answers under way are lost: {error}");
    }
    for (_, one) in std::mem::take(waiting) {
        let _ = one.replies.try_send(Reply::Lost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use commonweal_package::Package;
    use commonweal_runtime::{Library, OpenOptions};
    use tokio::sync::mpsc;

    fn model() -> Model {
        let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/reference/package");
        assert!(package.exists(), "{} is missing: run scripts/setup first", package.display());
        let library = Library::load(None).unwrap();
        Model::open(&library, &Package::open(package).unwrap(), OpenOptions::default()).unwrap()
    }

    fn job(model: &Model, tokens: usize, answers: usize) -> (Job, Receiver<Reply>) {
        let options = GenerateOptions { max_new_tokens: tokens, temperature: 1.0, ..Default::default() };
        let (replies, receiver) = mpsc::channel(replies_max(&options, answers));
        let prompt = model.tokenizer().encode("The sea is").unwrap().into();
        (Job { adapter: 0, prompt, options, answers, alternatives: Some(1), first: 0, replies }, receiver)
    }

    #[test]
    fn whoever_has_gone_leaves_the_batch_and_the_others_stay() {
        let model = model();
        let base = model.prepare(None).unwrap();
        let (mut batches, mut waiting) = (vec![Together::new(&model, &base)], BTreeMap::new());
        let ((gone, gone_reads), (stays, mut stays_reads)) = (job(&model, 50, 3), job(&model, 50, 1));
        let step = |batches: &mut Vec<Together<'_>>, waiting: &mut BTreeMap<Ticket, Waiting>| {
            let on_said = &mut |ticket, answer, said: Said<'_>| tell(waiting, ticket, answer, said);
            batches[0].step(&Cancel::new(), on_said).unwrap();
        };
        begin(&mut batches[0], Ticket(1), gone, &mut waiting);
        step(&mut batches, &mut waiting);
        begin(&mut batches[0], Ticket(2), stays, &mut waiting);
        step(&mut batches, &mut waiting);
        assert_eq!((batches[0].answering(), waiting.len()), (4, 2));
        drop_gone(&mut batches, &mut waiting);
        assert_eq!(batches[0].answering(), 4);
        drop(gone_reads);
        drop_gone(&mut batches, &mut waiting);
        assert_eq!((batches[0].answering(), waiting.len()), (1, 1));
        assert!(matches!(stays_reads.try_recv(), Ok(Reply::Begun)));
        // Whoever went before their turn never joins.
        let (late, late_reads) = job(&model, 5, 1);
        drop(late_reads);
        begin(&mut batches[0], Ticket(3), late, &mut waiting);
        assert!(batches[0].takes_more() && waiting.len() == 1);
    }

    #[test]
    fn a_reader_who_reads_nothing_misses_nothing() {
        let model = model();
        let base = model.prepare(None).unwrap();
        let (mut batch, mut waiting) = (Together::new(&model, &base), BTreeMap::new());
        let (asked, mut reads) = job(&model, 40, 2);
        begin(&mut batch, Ticket(1), asked, &mut waiting);
        while !batch.is_idle() {
            batch
                .step(&Cancel::new(), &mut |ticket, answer, said| tell(&mut waiting, ticket, answer, said))
                .unwrap();
        }
        let mut texts = vec![String::new(); 2];
        let mut wholes = vec![String::new(); 2];
        while let Ok(reply) = reads.try_recv() {
            match reply {
                Reply::Text { answer, text } => texts[answer].push_str(&text),
                Reply::Ended { answer, generated } => wholes[answer] = generated.text,
                _ => {}
            }
        }
        assert!(texts == wholes && !wholes[0].is_empty(), "{texts:?} {wholes:?}");
        assert!(waiting.is_empty());
    }

    #[test]
    fn the_thread_ends_when_it_is_told_and_tells_whoever_waits() {
        let model = model();
        let adapters = [model.prepare(None).unwrap()];
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (jobs, queue) = mpsc::channel(2);
        let end = End::default();
        std::thread::scope(|scope| {
            let handle = runtime.handle();
            scope.spawn(|| answer(&model, &adapters, queue, &end, handle));
            let (asked, mut reads) = job(&model, 10_000, 1);
            jobs.blocking_send(asked).unwrap();
            assert!(matches!(reads.blocking_recv(), Some(Reply::Begun)));
            end.now();
            let last = std::iter::from_fn(|| reads.blocking_recv()).last();
            assert!(matches!(last, Some(Reply::Lost | Reply::Ended { .. })), "{last:?}");
        });
        assert!(jobs.is_closed());
    }
}
