package raftgroup

import (
	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
)

// target finds the replica that a message is for.
func (h *Host) target(group block.GroupID, m *pb.Message) *Group {
	g := h.groups[group]
	if g == nil || g.failed != nil || m.GetTo() != uint64(g.cfg.Replica) || m.GetFrom() == uint64(g.cfg.Replica) {
		return nil
	}
	return g
}

func (h *Host) receiveRaft(from block.NodeID, msg transport.Message) {
	group, m, withPayload, err := decodeMessage(msg.Header)
	var g *Group
	if err == nil {
		g = h.target(group, m)
	}
	if g == nil {
		h.counters.MessagesBad++
		msg.Release()
		return
	}
	g.learn(from, block.ReplicaID(m.GetFrom()))
	switch m.GetType() {
	case pb.MsgApp:
		err = g.stage(m, withPayload, msg)
		if err != nil {
			h.counters.MessagesBad++
			h.cfg.Logf("group %d: %v", group, err)
			return
		}
	case pb.MsgAppResp:
		msg.Release()
		g.acknowledged(m)
	case pb.MsgSnap:
		msg.Release()
		g.offered(m)
		return
	default:
		msg.Release()
	}
	g.step(m)
}

// stage puts an append's entries, with their payloads, where accept finds those that Raft takes. It takes over the
// message's holds.
func (g *Group) stage(m *pb.Message, withPayload []bool, msg transport.Message) error {
	bufs := msg.Payloads
	var ents []held
	fail := func(k block.Kind, format string, args ...any) error {
		msg.Release()
		return block.Errorf(k, format, args...)
	}
	for i, e := range m.GetEntries() {
		en := held{}
		if withPayload[i] {
			if len(bufs) == 0 {
				return fail(block.Invalid, "an append without the payload of entry %d", e.GetIndex())
			}
			en.payload, bufs = bufs[0], bufs[1:]
		}
		if n := payloadBytes(e); n != payloadLen(en.payload) {
			return fail(block.Invalid, "entry %d: payload of %d bytes, its command says %d", e.GetIndex(), payloadLen(en.payload), n)
		}
		if e.GetIndex() <= g.commit && m.GetTerm() >= g.hard.Term {
			if t, ok := g.term(e.GetIndex()); ok && t != e.GetTerm() {
				err := fail(block.Corrupt, "entry %d is committed here with term %d, the leader has term %d", e.GetIndex(), t, e.GetTerm())
				g.fail(err)
				return err
			}
		}
		ents = append(ents, en)
	}
	if len(bufs) > 0 {
		return fail(block.Invalid, "an append with a payload too many")
	}
	for i, e := range m.GetEntries() {
		id := EntryID{Index: e.GetIndex(), Term: e.GetTerm()}
		if old, ok := g.staged[id]; ok {
			old.release()
		}
		if len(e.GetData()) > 0 {
			g.staged[id] = ents[i]
		}
	}
	return nil
}

func (h *Host) receiveBeats(from block.NodeID, msg transport.Message) {
	err := decodeBeats(msg.Header, func(b beat) {
		g := h.target(b.group, b.message)
		if g == nil {
			h.counters.MessagesBad++
			return
		}
		g.learn(from, block.ReplicaID(b.message.GetFrom()))
		if b.message.GetType() == pb.MsgHeartbeat {
			// A leader tells no follower of a commit beyond what that follower
			// acknowledged: then entries that were durable here are gone.
			if b.message.GetTerm() >= g.hard.Term && b.message.GetCommit() > g.lastIndexOrStaged() {
				g.fail(block.Errorf(block.Corrupt, "group %d: the leader knows entry %d committed and acknowledged here, the log ends at %d",
					b.group, b.message.GetCommit(), g.lastIndex()))
				return
			}
			g.slowest = max(g.slowest, b.slowest)
		}
		g.step(b.message)
	})
	if err != nil {
		h.counters.MessagesBad++
	}
}

// lastIndexOrStaged is lastIndex after this turn's flush, at most.
func (g *Group) lastIndexOrStaged() uint64 {
	last := g.lastIndex()
	for id := range g.staged {
		last = max(last, id.Index)
	}
	return last
}
