package raftgroup

import (
	"bytes"
	"testing"

	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func command(blocks uint16) []byte {
	return wire.AppendCommand(nil, &wire.Command{Type: wire.CmdWrite, Count: blocks, PayloadBytes: uint32(blocks) * block.Size, CRCs: make([]uint32, blocks), OpSeq: 9})
}

func u(v uint64) *uint64 { return &v }

func messages() []*pb.Message {
	yes := true
	return []*pb.Message{
		{Type: pb.MsgApp.Enum(), To: u(2), From: u(1), Term: u(7), LogTerm: u(6), Index: u(100), Commit: u(99), Entries: []*pb.Entry{
			{Term: u(6), Index: u(101), Data: command(3)},
			{Term: u(7), Index: u(102)},
			{Term: u(7), Index: u(103), Data: wire.AppendCommand(nil, &wire.Command{Type: wire.CmdMark, ToChunk: 5})},
			{Term: u(7), Index: u(104), Type: pb.EntryConfChangeV2.Enum(), Data: []byte{1, 2}},
		}},
		{Type: pb.MsgApp.Enum(), To: u(2), From: u(1), Term: u(7), LogTerm: u(7), Index: u(104), Commit: u(104)},
		{Type: pb.MsgAppResp.Enum(), To: u(1), From: u(2), Term: u(7), LogTerm: u(5), Index: u(100), Commit: u(0), Reject: &yes, RejectHint: u(80)},
		{Type: pb.MsgVote.Enum(), To: u(3), From: u(1), Term: u(8), LogTerm: u(7), Index: u(104), Commit: u(0), Context: []byte("CampaignTransfer")},
		{Type: pb.MsgSnap.Enum(), To: u(3), From: u(1), Term: u(8), LogTerm: u(7), Index: u(104), Commit: u(90)},
		{Type: pb.MsgTimeoutNow.Enum(), To: u(3), From: u(1), Term: u(8), LogTerm: u(0), Index: u(0), Commit: u(0)},
	}
}

func TestMessagesRoundTrip(t *testing.T) {
	for _, m := range messages() {
		b := appendMessage(nil, 77, m)
		g, got, with, err := decodeMessage(b)
		if err != nil || g != 77 || got.String() != m.String() {
			t.Fatalf("%v\nbecame, with error %v, group %d\n%v", m, err, g, got)
		}
		for i, e := range m.GetEntries() {
			if with[i] != (payloadBytes(e) > 0) {
				t.Errorf("entry %d: payload flag %v", i, with[i])
			}
		}
	}
}

func TestBeatsRoundTrip(t *testing.T) {
	var b []byte
	for i := range uint64(50) {
		m := &pb.Message{Type: pb.MsgHeartbeat.Enum(), To: u(i + 1), From: u(9), Term: u(i + 5), Commit: u(i * 1000)}
		if i%2 == 0 {
			m.Context = []byte("8 bytes.")
		}
		if i%3 == 0 {
			m.Type, m.Commit = pb.MsgHeartbeatResp.Enum(), nil
		}
		b = appendBeat(b, block.GroupID(i), m, i)
	}
	n := uint64(0)
	err := decodeBeats(b, func(x beat) {
		if x.message.GetTo() != n+1 || x.message.GetTerm() != n+5 || x.group != block.GroupID(n) || x.slowest != n ||
			(len(x.message.GetContext()) == 8) != (n%2 == 0) || (x.message.GetType() == pb.MsgHeartbeatResp) != (n%3 == 0) {
			t.Errorf("item %d: %v", n, x.message)
		}
		n++
	})
	if err != nil || n != 50 {
		t.Fatalf("%d items, %v", n, err)
	}
	if per := len(b) / 50; per > 20 {
		t.Errorf("%d bytes per heartbeat", per)
	}
}

func TestConfRoundTrip(t *testing.T) {
	c := NewConf(map[block.ReplicaID]block.NodeID{3: 30, 1: 10, 2: 20})
	c.Members = append(c.Members, Member{Replica: 5, Node: 50, Role: Learner}, Member{Replica: 6, Node: 60, Role: VoterIncoming})
	c.LastReplica, c.AutoLeave, c.Index = 7, true, 1234
	b := c.Append(nil)
	got, err := DecodeConf(b)
	if err != nil || !bytes.Equal(got.Append(nil), b) {
		t.Fatalf("%+v, %v", got, err)
	}
	cs := got.state()
	if len(cs.Voters) != 4 || len(cs.VotersOutgoing) != 3 || len(cs.Learners) != 1 || !cs.GetAutoLeave() {
		t.Errorf("joint state %v", cs)
	}
	if n, ok := got.NodeOf(2); !ok || n != 20 {
		t.Errorf("replica 2 is on node %d", n)
	}
}

func FuzzMessage(f *testing.F) {
	for _, m := range messages() {
		f.Add(appendMessage(nil, 77, m))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		g, m, with, err := decodeMessage(p)
		if err != nil {
			return
		}
		if len(with) != len(m.GetEntries()) {
			t.Fatal("flags and entries differ in number")
		}
		// What decodes must encode to what decodes the same.
		_, again, _, err := decodeMessage(appendMessage(nil, g, m))
		if err != nil || again.String() != m.String() {
			t.Fatalf("%v then %v, %v", m, again, err)
		}
	})
}

func FuzzBeats(f *testing.F) {
	f.Add(appendBeat(nil, 3, &pb.Message{Type: pb.MsgHeartbeat.Enum(), To: u(1), From: u(9), Term: u(5), Commit: u(1000), Context: []byte("8 bytes.")}, 4))
	f.Fuzz(func(t *testing.T, p []byte) {
		var b []byte
		n := 0
		if decodeBeats(p, func(x beat) { b = appendBeat(b, x.group, x.message, x.slowest); n++ }) != nil || n == 0 {
			return
		}
		if err := decodeBeats(b, func(beat) { n-- }); err != nil || n != 0 {
			t.Fatalf("%v, %d items lost", err, n)
		}
	})
}

func FuzzConf(f *testing.F) {
	c := NewConf(map[block.ReplicaID]block.NodeID{3: 30, 1: 10, 2: 20})
	f.Add(c.Append(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := DecodeConf(p)
		if err == nil && !bytes.Equal(c.Append(nil), p) {
			t.Fatalf("%x decodes and encodes to %x", p, c.Append(nil))
		}
	})
}
