package raftgroup

import (
	"fmt"

	"go.etcd.io/raft/v3"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// recoveryBytes is how much of the log one read brings while a replica opens.
const recoveryBytes = 1 << 20

// Open recovers a replica and starts it: the log is brought in line with what
// is applied (L6), committed entries above are applied in batches, the rest of
// the log is kept in memory. done is called on the loop; after an error nothing
// is open. Kinds Exists, Corrupt (log or state damaged), and what log and state
// machine gave.
func (h *Host) Open(cfg GroupConfig, done func(*Group, error)) {
	if h.groups[cfg.Group] != nil || h.opening[cfg.Group] {
		h.loop.Post(func() { done(nil, block.Errorf(block.Exists, "group %d is open", cfg.Group)) })
		return
	}
	h.opening[cfg.Group] = true
	if cfg.Loop == nil {
		cfg.Loop = h.loop
	}
	g := &Group{host: h, cfg: cfg, staged: make(map[EntryID]held)}
	r := &recovery{g: g, done: func(err error) {
		delete(h.opening, cfg.Group)
		if err != nil {
			g.release()
			done(nil, fmt.Errorf("open group %d replica %d: %w", cfg.Group, cfg.Replica, err))
			return
		}
		g.disk = h.diskOf(cfg.Disk)
		h.add(g)
		if g.conf.sole(cfg.Replica) {
			g.Campaign() // nobody else to wait for
		}
		done(g, nil)
	}}
	h.loop.Post(r.start)
}

// recovery is the opening of one replica, a step at a time.
type recovery struct {
	g    *Group
	next uint64 // the first entry that was not read yet
	last uint64
	done func(error)
}

func (r *recovery) start() {
	g, log := r.g, r.g.cfg.Log
	conf, err := DecodeConf(g.cfg.State.Conf())
	if err != nil {
		r.done(err)
		return
	}
	g.conf = conf
	g.applied = g.cfg.State.Applied()
	g.hard = log.HardState()
	if g.hard.Term < g.applied.Term {
		g.hard.Term, g.hard.Vote = g.applied.Term, 0
	}
	if g.applied.Index+1 < log.FirstIndex() {
		r.done(block.Errorf(block.Corrupt, "the log starts at %d, applied is %d", log.FirstIndex(), g.applied.Index))
		return
	}
	if term, ok := log.Term(g.applied.Index); !ok || term != g.applied.Term {
		// L6: the log lost what is applied; it starts anew from there.
		g.hard.Commit = g.applied.Index
		hs, at := g.hard, g.applied
		log.Append(LogWrite{HardState: &hs, Truncate: &at}, func(err error) {
			if err != nil {
				r.done(err)
				return
			}
			r.begin()
		})
		return
	}
	r.begin()
}

func (r *recovery) begin() {
	g := r.g
	r.last = g.cfg.Log.LastIndex()
	g.hard.Commit = max(g.hard.Commit, g.applied.Index)
	if g.hard.Commit > r.last {
		r.done(block.Errorf(block.Corrupt, "the log ends at %d, committed is %d", r.last, g.hard.Commit))
		return
	}
	r.next = g.applied.Index + 1
	r.read()
}

// read goes on with the next batch, off the loop.
func (r *recovery) read() {
	if r.next > r.last {
		r.run()
		return
	}
	log, lo, hi := r.g.cfg.Log, r.next, r.last+1
	var ents []LogEntry
	var err error
	r.g.cfg.Loop.Do(loop.DiskRead, func() { ents, err = log.Read(lo, hi, recoveryBytes, false) }, func() {
		if err == nil && len(ents) == 0 {
			err = block.Errorf(block.Corrupt, "entry %d cannot be read", lo)
		}
		if err != nil {
			r.done(err)
			return
		}
		r.take(ents)
	})
}

func (r *recovery) take(ents []LogEntry) {
	g := r.g
	for _, le := range ents {
		if term, ok := g.cfg.Log.Term(le.Index); le.Index != r.next || !ok || term != le.Term {
			r.done(block.Errorf(block.Corrupt, "entry %d of term %d is read where %d is due", le.Index, le.Term, r.next))
			return
		}
		en := heldOf(le)
		if le.Index > g.hard.Commit {
			g.tail.push(en)
			g.host.retained.push(g, &en)
		} else if _, err := g.applyEntry(en.entry); err != nil {
			r.done(fmt.Errorf("apply entry %d: %w", le.Index, err))
			return
		} else {
			g.applied = en.id()
		}
		r.next++
	}
	r.read()
}

// run makes the Raft node.
func (r *recovery) run() {
	g := r.g
	g.commit, g.stable, g.written = g.hard.Commit, r.last, g.cfg.Log.HardState()
	g.slowest = g.cfg.Log.FirstIndex() - 1 // nobody gets from this log what it has not
	if len(g.tail.ents) == 0 {
		g.tail.first = r.last + 1
	}
	node, err := raft.NewRawNode(&raft.Config{
		ID:                        uint64(g.cfg.Replica),
		ElectionTick:              ElectionTicks,
		HeartbeatTick:             HeartbeatTicks,
		Storage:                   storage{g},
		Applied:                   g.applied.Index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             maxAppendHeaders,
		MaxCommittedSizePerReady:  maxApplyHeaders,
		MaxUncommittedEntriesSize: maxUncommittedHeaders,
		MaxInflightMsgs:           maxInflightAppends,
		CheckQuorum:               true,
		PreVote:                   true,
		ReadOnlyOption:            raft.ReadOnlySafe,
		DisableProposalForwarding: true,
		StepDownOnRemoval:         true,
		Logger:                    logger{g},
	})
	if err != nil {
		r.done(err)
		return
	}
	g.raft = node
	r.done(nil)
}
