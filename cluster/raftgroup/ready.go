package raftgroup

import (
	"encoding/binary"

	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// flush gives Raft what the turn gathered and carries out what it answers.
func (g *Group) flush() {
	if g.raft == nil || g.failed != nil || g.closed {
		return
	}
	// First what was received: it decides who leads and where the log ends.
	g.drain()
	if len(g.queue) > 0 {
		g.propose()
	}
	if len(g.askReads) > 0 && g.Leading() {
		g.askRead()
	}
	g.drain()
	for id, e := range g.staged {
		e.release() // Raft did not want it: a duplicate, or of an old term
		delete(g.staged, id)
	}
	for _, f := range g.followers {
		g.pump(f)
	}
}

func (g *Group) drain() {
	for g.failed == nil && !g.closed && g.raft.HasReady() {
		g.ready(g.raft.Ready())
	}
}

// propose makes one MsgProp of the queue. The entries' indexes are known
// beforehand: drain has taken all that Raft appended until now.
func (g *Group) propose() {
	queue := g.queue
	g.queue = nil
	refuse := func(why wire.Status) {
		for _, pr := range queue {
			g.host.proposed -= pr.bytes
			g.refuse(pr, why)
		}
	}
	if !g.Leading() {
		refuse(wire.StatusNotLeader)
		return
	}
	ents := make([]*pb.Entry, len(queue))
	for i, pr := range queue {
		ents[i] = &pb.Entry{Data: pr.data}
		if pr.conf {
			ents[i].Type = pb.EntryConfChangeV2.Enum()
		}
	}
	g.host.counters.Proposals += uint64(len(queue))
	id := uint64(g.cfg.Replica)
	if err := g.raft.Step(&pb.Message{Type: pb.MsgProp.Enum(), From: &id, Entries: ents}); err != nil {
		// A transfer of the lead is under way, or too much is uncommitted.
		refuse(wire.StatusBusy)
		return
	}
	next := g.lastIndex() + 1
	for i := range queue {
		pr := &queue[i]
		pr.index = next + uint64(i)
		if pr.conf {
			g.changing = pr.index
		}
		g.staged[EntryID{Index: pr.index, Term: g.hard.Term}] = held{payload: pr.payload}
		pr.payload, pr.data = nil, nil
	}
	g.pending = append(g.pending, queue...)
}

// askRead makes one ReadIndex of the turn's reads.
func (g *Group) askRead() {
	h := g.host
	h.reads++
	for i := range g.askReads {
		g.askReads[i].id = h.reads
	}
	g.reading = append(g.reading, g.askReads...)
	g.askReads = nil
	g.raft.ReadIndex(binary.LittleEndian.AppendUint64(nil, h.reads))
}

func (g *Group) ready(rd raft.Ready) {
	if rd.HardState != nil && !raft.IsEmptyHardState(rd.HardState) {
		hs := HardState{Term: rd.HardState.GetTerm(), Vote: rd.HardState.GetVote(), Commit: rd.HardState.GetCommit()}
		if hs.Term != g.hard.Term {
			g.dropPending()
		}
		g.hard = hs
		g.commit = hs.Commit
	}
	if rd.SoftState != nil {
		g.turn(rd.SoftState)
	}
	for _, rs := range rd.ReadStates {
		g.confirm(binary.LittleEndian.Uint64(rs.RequestCtx), rs.Index)
	}
	for _, m := range rd.Messages {
		switch m.GetTo() {
		case raft.LocalAppendThread:
			g.persist(m)
		case raft.LocalApplyThread:
			g.apply(m)
		default:
			g.send(m)
		}
		if g.failed != nil || g.closed {
			return
		}
	}
}

// turn takes over a new role or leader.
func (g *Group) turn(st *raft.SoftState) {
	if g.role == raft.StateLeader && st.RaftState != raft.StateLeader {
		g.dropPending()
	}
	g.role, g.lead = st.RaftState, block.ReplicaID(st.Lead)
	if g.role == raft.StateLeader {
		g.awayUntil = 0
	}
	if g.cfg.Changed != nil {
		g.host.loop.Post(func() {
			if !g.closed {
				g.cfg.Changed(g)
			}
		})
	}
}

// write is a write to the log on its way, with what Raft wants said after it.
type write struct {
	last  EntryID // of its entries, if any
	after []*pb.Message
	done  func(error) // of a truncation
}

// persist queues what Raft wants durable, and what it wants said after that. A
// commit index alone is not worth a sync: it goes with the next write, and what
// is to be said with it waits only for the writes before.
func (g *Group) persist(m *pb.Message) {
	w := LogWrite{}
	if len(m.GetEntries()) > 0 && !g.accept(m.GetEntries(), &w) {
		return
	}
	if len(w.Entries) == 0 && g.hard.Term == g.written.Term && g.hard.Vote == g.written.Vote {
		if n := len(g.writes); n > 0 {
			g.writes[n-1].after = append(g.writes[n-1].after, m.GetResponses()...)
		} else {
			g.respond(m.GetResponses())
		}
		return
	}
	if g.hard != g.written {
		hs := g.hard
		w.HardState = &hs
		g.written = hs
	}
	wr := &write{after: m.GetResponses()}
	if n := len(w.Entries); n > 0 {
		wr.last = EntryID{Index: w.Entries[n-1].Index, Term: w.Entries[n-1].Term}
	}
	g.append(w, wr)
}

// accept moves Raft's new entries from staged to the tail and to w.
func (g *Group) accept(ents []*pb.Entry, w *LogWrite) bool {
	first := ents[0].GetIndex()
	if len(g.tail.ents) > 0 && first <= g.tail.last() {
		g.tail.cut(first)
	}
	g.cutWindows(first)
	g.stable = min(g.stable, first-1)
	w.Entries = make([]LogEntry, len(ents))
	for i, e := range ents {
		id := EntryID{Index: e.GetIndex(), Term: e.GetTerm()}
		en := held{}
		if len(e.GetData()) > 0 {
			staged, ok := g.staged[id]
			if !ok {
				g.fail(block.Errorf(block.Internal, "group %d: entry %d of term %d came without its command", g.cfg.Group, id.Index, id.Term))
				return false
			}
			delete(g.staged, id)
			en = staged
		}
		en.entry = e
		w.Entries[i] = LogEntry{Term: id.Term, Index: id.Index, Data: logData(e), Payload: en.payload}
		g.tail.push(en)
		g.host.retained.push(g, &en)
	}
	return true
}

// append queues a write to the log. A failure is final.
func (g *Group) append(w LogWrite, wr *write) {
	h := g.host
	h.counters.Appends++
	g.disk.writes = append(g.disk.writes, h.ticks)
	g.writes = append(g.writes, wr)
	g.cfg.Log.Append(w, func(err error) {
		g.disk.writes = g.disk.writes[1:]
		g.writes = g.writes[1:]
		switch {
		case g.closed || g.failed != nil:
		case err != nil:
			g.fail(block.Wrap(block.KindOf(err), err, "group %d: log", g.cfg.Group))
		default:
			if e := g.tail.at(wr.last.Index); e != nil && e.entry.GetTerm() == wr.last.Term {
				g.stable = max(g.stable, wr.last.Index)
			}
			g.respond(wr.after)
		}
		if wr.done != nil {
			wr.done(err)
		}
	})
}

// respond says what waited for a write.
func (g *Group) respond(ms []*pb.Message) {
	for _, m := range ms {
		if m.GetTo() == uint64(g.cfg.Replica) {
			g.step(m)
		} else {
			g.send(m)
		}
	}
}

// apply applies committed entries; they are durable here.
func (g *Group) apply(m *pb.Message) {
	for _, e := range m.GetEntries() {
		id := EntryID{Index: e.GetIndex(), Term: e.GetTerm()}
		res, err := g.applyEntry(e)
		if err != nil {
			g.fail(block.Wrap(block.KindOf(err), err, "group %d: apply entry %d of term %d", g.cfg.Group, id.Index, id.Term))
			return
		}
		g.applied = id
		g.host.counters.Applied++
		for len(g.pending) > 0 && g.pending[0].index <= id.Index {
			pr := g.pending[0]
			g.pending[0] = proposal{}
			g.pending = g.pending[1:]
			if pr.index == id.Index && g.hard.Term == id.Term {
				g.end(pr, res, wire.StatusOK)
			} else {
				g.end(pr, wire.ApplyResult{}, wire.StatusDropped)
			}
		}
	}
	g.finishReads()
	for _, r := range m.GetResponses() {
		g.step(r)
	}
}

// applyEntry decodes and applies one entry.
func (g *Group) applyEntry(e *pb.Entry) (wire.ApplyResult, error) {
	h, sm := g.host, g.cfg.State
	id := EntryID{Index: e.GetIndex(), Term: e.GetTerm()}
	switch {
	case e.GetType() != pb.EntryNormal:
		return wire.ApplyResult{}, g.applyChange(id, e)
	case len(e.GetData()) == 0:
		sm.ApplyEmpty(id)
		return wire.ApplyResult{}, nil
	}
	h.command.CRCs = nil // the last ones belong to the state machine
	if err := wire.DecodeCommand(e.GetData(), &h.command); err != nil {
		return wire.ApplyResult{}, err
	}
	return sm.Apply(id, &h.command)
}

func (g *Group) confirm(id, index uint64) {
	rest := g.reading[:0]
	for _, r := range g.reading {
		if r.id == id {
			r.index = index
			g.confirmed = append(g.confirmed, r)
		} else {
			rest = append(rest, r)
		}
	}
	g.reading = rest
	g.finishReads()
}

func (g *Group) finishReads() {
	if len(g.confirmed) == 0 {
		return
	}
	rest := g.confirmed[:0]
	for _, r := range g.confirmed {
		if r.index <= g.applied.Index {
			g.host.answer(answer{read: r.done, index: r.index, ok: true})
		} else {
			rest = append(rest, r)
		}
	}
	g.confirmed = rest
}

// heldOf is the form in memory of an entry that was read from the log.
func heldOf(le LogEntry) held {
	term, index := le.Term, le.Index
	e := &pb.Entry{Term: &term, Index: &index}
	takeLogData(e, le.Data)
	return held{entry: e, payload: le.Payload}
}

func payloadLen(p *payload.Buf) int {
	if p == nil {
		return 0
	}
	return p.Len()
}
