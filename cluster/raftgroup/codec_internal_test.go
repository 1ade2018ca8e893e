package raftgroup

import (
	"bytes"
	"testing"

	"go.etcd.io/raft/v3/confchange"
	pb "go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

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

// FuzzChange: of a change of members that decodes and that the configuration
// allows, the library must make the same; it panics on what it does not allow.
func FuzzChange(f *testing.F) {
	three := NewConf(map[block.ReplicaID]block.NodeID{1: 10, 2: 20, 3: 30})
	confs := []Conf{three}
	for _, ch := range []Change{
		{Kind: AddLearner, Members: []Member{{Replica: 4, Node: 40}}},
		{Kind: Replace, Members: []Member{{Replica: 4, Node: 40}}, Remove: []block.ReplicaID{2}},
		{Kind: Leave},
		{Kind: DropLearner, Remove: []block.ReplicaID{4}},
	} {
		ch.Base = three.Index
		if ch.Kind == DropLearner {
			confs = append(confs, confs[1])
		}
		last := confs[len(confs)-1]
		ch.Base = last.Index
		p, err := encodeChange(&ch)
		if err != nil {
			f.Fatal(err)
		}
		for i := range 5 {
			f.Add(uint8(i), p)
		}
		next, ok := last.after(&ch, last.Index+1)
		if !ok {
			f.Fatalf("%+v is void after %+v", ch, last)
		}
		confs = append(confs, next)
	}
	f.Fuzz(func(t *testing.T, which uint8, p []byte) {
		ch, cc, err := decodeChange(p)
		if err != nil {
			return
		}
		if again, err := encodeChange(&ch); err != nil || !sameChange(again, cc) {
			t.Fatalf("%+v encodes to %x, %v", ch, again, err)
		}
		before := confs[int(which)%len(confs)]
		ch.Base = before.Index // so that more of them count
		next, ok := before.after(&ch, before.Index+1)
		if !ok {
			return
		}
		changer := confchange.Changer{Tracker: tracker.MakeProgressTracker(1, 1), LastIndex: 1}
		cfg, progress, err := confchange.Restore(changer, before.state())
		if err != nil {
			t.Fatal(err)
		}
		changer.Tracker.Config, changer.Tracker.Progress = cfg, progress
		if auto, joint := cc.EnterJoint(); joint {
			cfg, _, err = changer.EnterJoint(auto, cc.GetChanges()...)
		} else if cc.LeaveJoint() {
			cfg, _, err = changer.LeaveJoint()
		} else {
			cfg, _, err = changer.Simple(cc.GetChanges()...)
		}
		if err != nil {
			t.Fatalf("%+v is allowed after %+v, and the library says %v", ch, before, err)
		}
		changer.Tracker.Config = cfg
		if err := changer.Tracker.ConfState().Equivalent(next.state()); err != nil {
			t.Fatal(err)
		}
	})
}
