package raftgroup

import (
	"encoding/binary"

	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// The headers of TypeRaft and TypeHeartbeat. Numbers are unsigned varints.
//
// TypeRaft: version, kind, flags, group, to, from, term, log term, index,
// commit, reject hint, length of context, context, number of entries; per
// entry term, flags, length of data, data. Entry i has index + 1 + i. The
// message's payload buffers belong, in order, to the entries with the payload
// flag. In a snapshot index and log term are what the leader has applied, commit
// is the end of what its log has forgotten, and nothing else is said: the state
// itself travels another way (see Group.offer).
//
// TypeHeartbeat: version, then until the end of the header items of flags,
// group, to, from, term, commit, slowest, and with the context flag 8 bytes.
const (
	messageVersion = 1

	flagReject = 1 << 0

	entryPayload = 1 << 0
	entryConf    = 1 << 1

	beatAnswer  = 1 << 0
	beatContext = 1 << 1

	maxContext = 32
)

// kinds that travel in TypeRaft; the values are those of the library, which
// keeps them.
func travels(t pb.MessageType) bool {
	switch t {
	case pb.MsgApp, pb.MsgAppResp, pb.MsgVote, pb.MsgVoteResp, pb.MsgPreVote, pb.MsgPreVoteResp, pb.MsgTimeoutNow, pb.MsgSnap:
		return true
	}
	return false
}

func appendMessage(dst []byte, group block.GroupID, m *pb.Message) []byte {
	if dst == nil {
		n := 64
		for _, e := range m.GetEntries() {
			n += len(e.GetData()) + 16
		}
		dst = make([]byte, 0, n)
	}
	var flags byte
	if m.GetReject() {
		flags |= flagReject
	}
	dst = append(dst, messageVersion, byte(m.GetType()), flags)
	for _, v := range [...]uint64{uint64(group), m.GetTo(), m.GetFrom(), m.GetTerm(), m.GetLogTerm(), m.GetIndex(),
		m.GetCommit(), m.GetRejectHint(), uint64(len(m.GetContext()))} {
		dst = binary.AppendUvarint(dst, v)
	}
	dst = append(dst, m.GetContext()...)
	dst = binary.AppendUvarint(dst, uint64(len(m.GetEntries())))
	for _, e := range m.GetEntries() {
		var flags byte
		if e.GetType() != pb.EntryNormal {
			flags |= entryConf
		}
		if payloadBytes(e) > 0 {
			flags |= entryPayload
		}
		dst = binary.AppendUvarint(dst, e.GetTerm())
		dst = append(dst, flags)
		dst = binary.AppendUvarint(dst, uint64(len(e.GetData())))
		dst = append(dst, e.GetData()...)
	}
	return dst
}

// reader reads a header; after the first failure everything is zero and bad.
type reader struct {
	p   []byte
	bad bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.p)
	if n <= 0 || r.bad {
		r.bad, r.p = true, nil
		return 0
	}
	r.p = r.p[n:]
	return v
}

func (r *reader) byte() byte {
	if len(r.p) == 0 {
		r.bad = true
		return 0
	}
	b := r.p[0]
	r.p = r.p[1:]
	return b
}

// bytes returns the next n bytes, which stay part of the header.
func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.p)) {
		r.bad, r.p = true, nil
		return nil
	}
	b := r.p[:n:n]
	r.p = r.p[n:]
	return b
}

// decodeMessage reads a TypeRaft header. The entries' Data stays part of it.
// withPayload has one value per entry. Terms and indexes are checked for what
// no correct sender makes, so that the library's own assertions hold.
func decodeMessage(p []byte) (group block.GroupID, m *pb.Message, withPayload []bool, err error) {
	r := &reader{p: p}
	fail := func(what string) (block.GroupID, *pb.Message, []bool, error) {
		return 0, nil, nil, block.Errorf(block.Invalid, "raft message: %s", what)
	}
	if v := r.byte(); r.bad || v != messageVersion {
		return fail("unknown version")
	}
	kind, flags := pb.MessageType(r.byte()), r.byte()
	if !travels(kind) || flags&^flagReject != 0 {
		return fail("unknown kind or flag")
	}
	group = block.GroupID(r.uvarint())
	to, from, term, logTerm := r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint()
	index, commit, hint := r.uvarint(), r.uvarint(), r.uvarint()
	nctx := r.uvarint()
	if nctx > maxContext {
		return fail("context too long")
	}
	ctx := r.bytes(nctx)
	count := r.uvarint()
	if r.bad || count > maxEntriesPerMessage || count > uint64(len(r.p))/3 || count > 0 && kind != pb.MsgApp {
		return fail("does not hold what it claims")
	}
	if to == 0 || from == 0 || term == 0 || index > block.MaxRaftIndex || hint > block.MaxRaftIndex ||
		commit > block.MaxRaftIndex || (kind == pb.MsgApp || kind == pb.MsgSnap) && logTerm > term ||
		kind == pb.MsgSnap && (index == 0 || commit > index) {
		return fail("out of range")
	}
	m = &pb.Message{Type: kind.Enum(), To: &to, From: &from, Term: &term, LogTerm: &logTerm, Index: &index, Commit: &commit}
	if flags&flagReject != 0 {
		yes := true
		m.Reject, m.RejectHint = &yes, &hint
	}
	if len(ctx) > 0 {
		m.Context = ctx
	}
	if count > 0 {
		m.Entries = make([]*pb.Entry, count)
		withPayload = make([]bool, count)
	}
	prev := logTerm
	for i := range m.Entries {
		et, ef := r.uvarint(), r.byte()
		data := r.bytes(r.uvarint())
		if r.bad || et < prev || et > term || ef&^(entryPayload|entryConf) != 0 || ef&entryPayload != 0 && len(data) == 0 {
			return fail("an entry that does not make sense")
		}
		prev = et
		ei := index + 1 + uint64(i)
		e := &pb.Entry{Term: &et, Index: &ei}
		if ef&entryConf != 0 {
			e.Type = pb.EntryConfChangeV2.Enum()
		}
		if len(data) > 0 {
			e.Data = data
		}
		m.Entries[i] = e
		withPayload[i] = ef&entryPayload != 0
	}
	if r.bad || len(r.p) != 0 {
		return fail("trailing bytes")
	}
	return group, m, withPayload, nil
}

const maxEntriesPerMessage = transport.MaxPayloads

// beat is one item of a TypeHeartbeat.
type beat struct {
	group   block.GroupID
	message *pb.Message
	slowest uint64
}

func appendBeat(dst []byte, group block.GroupID, m *pb.Message, slowest uint64) []byte {
	if len(dst) == 0 {
		dst = append(dst, messageVersion)
	}
	var flags byte
	if m.GetType() == pb.MsgHeartbeatResp {
		flags |= beatAnswer
	}
	ctx := m.GetContext()
	if len(ctx) == 8 {
		flags |= beatContext
	}
	dst = append(dst, flags)
	for _, v := range [...]uint64{uint64(group), m.GetTo(), m.GetFrom(), m.GetTerm(), m.GetCommit(), slowest} {
		dst = binary.AppendUvarint(dst, v)
	}
	if flags&beatContext != 0 {
		dst = append(dst, ctx...)
	}
	return dst
}

// decodeBeats calls each for every item until the header ends.
func decodeBeats(p []byte, each func(beat)) error {
	r := &reader{p: p}
	if v := r.byte(); r.bad || v != messageVersion {
		return block.Errorf(block.Invalid, "heartbeats: unknown version")
	}
	for len(r.p) > 0 {
		flags := r.byte()
		group, to, from, term, commit, slowest := r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint()
		var ctx []byte
		if flags&beatContext != 0 {
			ctx = r.bytes(8)
		}
		if r.bad || flags&^(beatAnswer|beatContext) != 0 || to == 0 || from == 0 || term == 0 || commit > block.MaxRaftIndex {
			return block.Errorf(block.Invalid, "heartbeats: an item that does not make sense")
		}
		kind := pb.MsgHeartbeat
		if flags&beatAnswer != 0 {
			kind = pb.MsgHeartbeatResp
		}
		m := &pb.Message{Type: kind.Enum(), To: &to, From: &from, Term: &term, Context: ctx}
		if kind == pb.MsgHeartbeat {
			m.Commit = &commit
		}
		each(beat{group: block.GroupID(group), message: m, slowest: slowest})
	}
	return nil
}

// payloadBytes is the length of the payload that belongs to an entry, 0 if none.
func payloadBytes(e *pb.Entry) int {
	if e.GetType() != pb.EntryNormal {
		return 0
	}
	_, n, _ := wire.PeekPayload(e.GetData())
	return int(n)
}
