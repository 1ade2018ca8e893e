package raftgroup

import (
	"encoding/binary"
	"slices"

	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// A change of members is an entry of Raft's kind ConfChangeV2. Its context says
// what the library's form lacks: the conf that it was decided on, and the nodes
// of new members. Apply judges it alone, the same on every replica: a change
// that was decided on another conf, or names what is not there, is void (C2),
// and the library is not told of it.
//
// A joint change is always left by an entry of its own, which whoever leads
// proposes: the library's own has no data, and the log could not tell it from
// the first entry of a new leader.

// ChangeKind is what a Change does.
type ChangeKind uint8

const (
	// AddLearner adds Members, all new: replica ids above all that the group ever
	// gave out (C1).
	AddLearner ChangeKind = 1
	// Replace makes the learners in Members voters and takes the members in Remove
	// out, at once: a joint change, which the leader ends.
	Replace ChangeKind = 2
	// Leave ends a joint change.
	Leave ChangeKind = 3
	// DropLearner takes the learners in Remove out.
	DropLearner ChangeKind = 4
)

// Change is a change of members. It takes effect only on the conf that it was
// decided on.
type Change struct {
	Kind    ChangeKind
	Base    uint64 // Conf.Index
	Members []Member
	Remove  []block.ReplicaID
}

// after returns the members after the change, decided by the entry at index;
// false if it is void.
func (c *Conf) after(ch *Change, index uint64) (Conf, bool) {
	next := Conf{Index: index, LastReplica: c.LastReplica, Members: slices.Clone(c.Members)}
	if ch.Base != c.Index || c.joint() != (ch.Kind == Leave) {
		return *c, false
	}
	at := func(r block.ReplicaID) int {
		return slices.IndexFunc(next.Members, func(m Member) bool { return m.Replica == r })
	}
	switch ch.Kind {
	case AddLearner:
		for _, m := range ch.Members {
			if m.Replica <= next.LastReplica || m.Node == 0 {
				return *c, false
			}
			next.Members = append(next.Members, Member{Replica: m.Replica, Node: m.Node, Role: Learner})
			next.LastReplica = m.Replica
		}
	case Replace:
		for _, m := range ch.Members {
			i := at(m.Replica)
			if i < 0 || next.Members[i].Role != Learner {
				return *c, false
			}
			next.Members[i].Role = VoterIncoming
		}
		for _, r := range ch.Remove {
			i := at(r)
			if i < 0 || next.Members[i].Role != Voter {
				return *c, false
			}
			next.Members[i].Role = VoterOutgoing
		}
	case Leave:
		for i := range next.Members {
			switch m := &next.Members[i]; m.Role {
			case VoterIncoming:
				m.Role = Voter
			case VoterDemoting:
				m.Role = Learner
			}
		}
		next.Members = slices.DeleteFunc(next.Members, func(m Member) bool { return m.Role == VoterOutgoing })
	case DropLearner:
		for _, r := range ch.Remove {
			i := at(r)
			if i < 0 || next.Members[i].Role != Learner {
				return *c, false
			}
			next.Members = slices.Delete(next.Members, i, i+1)
		}
	}
	votes := slices.ContainsFunc(next.Members, func(m Member) bool { return m.Role == Voter || m.Role == VoterIncoming })
	if !votes || len(next.Members) > confMaxMembers || ch.Kind != Leave && len(ch.Members)+len(ch.Remove) == 0 {
		return *c, false
	}
	next.sort()
	return next, true
}

// The context of a change: version, kind, base, then replica and node of each
// member. Little-endian, fixed width. What is removed is in the library's part.
const (
	changeVersion = 1
	changeHead    = 1 + 1 + 8
	changeMember  = 8 + 4
)

// encodeChange returns the data of an entry.
func encodeChange(ch *Change) ([]byte, error) {
	ctx := binary.LittleEndian.AppendUint64([]byte{changeVersion, byte(ch.Kind)}, ch.Base)
	cc := &pb.ConfChangeV2{Transition: pb.ConfChangeTransitionAuto.Enum()}
	if ch.Kind == Replace {
		cc.Transition = pb.ConfChangeTransitionJointExplicit.Enum()
	}
	single := func(t pb.ConfChangeType, r block.ReplicaID) {
		id := uint64(r)
		cc.Changes = append(cc.Changes, &pb.ConfChangeSingle{Type: t.Enum(), NodeId: &id})
	}
	for _, m := range ch.Members {
		ctx = binary.LittleEndian.AppendUint64(ctx, uint64(m.Replica))
		ctx = binary.LittleEndian.AppendUint32(ctx, uint32(m.Node))
		if ch.Kind == AddLearner {
			single(pb.ConfChangeAddLearnerNode, m.Replica)
		} else {
			single(pb.ConfChangeAddNode, m.Replica)
		}
	}
	for _, r := range ch.Remove {
		single(pb.ConfChangeRemoveNode, r)
	}
	if ch.Kind == Leave {
		cc.Transition = nil // the library knows it by its emptiness, but for the context
	}
	cc.Context = ctx
	return proto.Marshal(cc)
}

// decodeChange is the inverse of encodeChange. Kinds Unsupported, Corrupt.
func decodeChange(data []byte) (Change, *pb.ConfChangeV2, error) {
	cc := &pb.ConfChangeV2{}
	bad := func(what string) (Change, *pb.ConfChangeV2, error) {
		return Change{}, nil, block.Errorf(block.Corrupt, "change of members: %s", what)
	}
	if err := proto.Unmarshal(data, cc); err != nil {
		return bad("it does not decode")
	}
	p := cc.GetContext()
	if len(p) < changeHead || (len(p)-changeHead)%changeMember != 0 || len(p) > changeHead+confMaxMembers*changeMember {
		return bad("a context of an impossible length")
	}
	ch := Change{Kind: ChangeKind(p[1]), Base: binary.LittleEndian.Uint64(p[2:])}
	if p[0] != changeVersion || ch.Kind < AddLearner || ch.Kind > DropLearner {
		return Change{}, nil, block.Errorf(block.Unsupported, "change of members: version %d, kind %d", p[0], p[1])
	}
	for p = p[changeHead:]; len(p) > 0; p = p[changeMember:] {
		ch.Members = append(ch.Members, Member{
			Replica: block.ReplicaID(binary.LittleEndian.Uint64(p)), Node: block.NodeID(binary.LittleEndian.Uint32(p[8:])),
		})
	}
	for _, s := range cc.GetChanges() {
		if s.GetType() == pb.ConfChangeRemoveNode {
			ch.Remove = append(ch.Remove, block.ReplicaID(s.GetNodeId()))
		}
	}
	if again, err := encodeChange(&ch); err != nil || !sameChange(again, cc) {
		return bad("its parts say different things")
	}
	return ch, cc, nil
}

func sameChange(data []byte, cc *pb.ConfChangeV2) bool {
	other := &pb.ConfChangeV2{}
	return proto.Unmarshal(data, other) == nil && proto.Equal(other, cc)
}

// ChangeMembers proposes a change of members and calls done exactly once, on the
// loop, after the turn. StatusOK: it was applied, and took effect if Conf's index
// is that of the result's version; else it was void. Other statuses are
// those of Propose; StatusBusy also while an earlier change is not applied.
func (g *Group) ChangeMembers(ch Change, done func(index uint64, st wire.Status)) {
	h := g.host
	data, err := encodeChange(&ch)
	_, sound := g.conf.after(&ch, g.conf.Index+1)
	pr := proposal{done: func(_ wire.ApplyResult, st wire.Status) { done(g.conf.Index, st) }}
	switch {
	case err != nil || !sound:
		g.refuse(pr, wire.StatusInvalid)
		return
	case !g.Leading() || g.closed:
		g.refuse(pr, wire.StatusNotLeader)
		return
	case g.changing > g.applied.Index:
		g.refuse(pr, wire.StatusBusy)
		return
	}
	pr.data, pr.conf = data, true
	pr.bytes = entryOverhead + int64(len(data))
	h.proposed += pr.bytes
	g.queue = append(g.queue, pr)
	h.mark(g)
}

// applyChange judges a change of members and takes it over.
func (g *Group) applyChange(id EntryID, e *pb.Entry) error {
	if len(e.GetData()) == 0 {
		return block.Errorf(block.Unsupported, "a change of members without data")
	}
	ch, cc, err := decodeChange(e.GetData())
	if err != nil {
		return err
	}
	next, ok := g.conf.after(&ch, id.Index)
	if !ok {
		g.cfg.State.ApplyEmpty(id)
		g.host.cfg.Logf("group %d: a change of members decided at %d is void, they are those of %d", g.cfg.Group, ch.Base, g.conf.Index)
		return nil
	}
	g.conf = next
	g.cfg.State.ApplyConf(id, next.Append(nil))
	if g.raft == nil {
		return nil // it starts from what is applied
	}
	cs := g.raft.ApplyConfChange(cc)
	if err := cs.Equivalent(next.state()); err != nil {
		return block.Wrap(block.Internal, err, "members after entry %d", id.Index)
	}
	g.followers = slices.DeleteFunc(g.followers, func(f *follower) bool {
		_, member := next.NodeOf(f.replica)
		if !member {
			g.forget(f)
		}
		return !member
	})
	return nil
}

// leaveJoint ends a joint change that is applied, whoever began it.
func (g *Group) leaveJoint() {
	if g.Leading() && g.conf.joint() && g.changing <= g.applied.Index {
		g.ChangeMembers(Change{Kind: Leave, Base: g.conf.Index}, func(uint64, wire.Status) {})
	}
}

// confMark tells, in the log, the data of a change of members from a command,
// which begins with the version of its envelope.
const confMark = 0xff

// logData is how the log stores an entry's data.
func logData(e *pb.Entry) []byte {
	if e.GetType() == pb.EntryNormal {
		return e.GetData()
	}
	return append([]byte{confMark}, e.GetData()...)
}

// takeLogData is the inverse of logData.
func takeLogData(e *pb.Entry, data []byte) {
	switch {
	case len(data) == 0:
	case data[0] == confMark:
		e.Type, e.Data = pb.EntryConfChangeV2.Enum(), data[1:]
	default:
		e.Data = data
	}
}

// caughtUpEntries is how far a learner may be behind what is committed when it
// becomes a voter.
const caughtUpEntries = 256

// Order is a replacement of members that the coordinator decided on the conf of
// index Base (C2): Add are the new members, under ids never given out before.
type Order struct {
	Base   uint64
	Add    []Member
	Remove []block.ReplicaID
	// GivenUp: the new members are lost. Those that do not vote yet are dropped,
	// and their ids are used up, so that no leader that still knows the order as
	// it was can add them later.
	GivenUp bool
}

// OrderState is how far an order is.
type OrderState uint8

const (
	// OrderVoid: the members are others than it was decided on, for good: no
	// leader will carry it out any more.
	OrderVoid OrderState = iota
	// OrderOpen: the new members are still to be added, filled or made voters.
	OrderOpen
	// OrderDone: the members are those that it asked for.
	OrderDone
)

// Pursue takes the next step of an order, if this replica leads and one is due:
// learners are added; once they hold nearly all that is committed they become
// voters and the old members leave, in one joint change. It is called again and
// again, by whoever leads, until the order is void or done. What it returns is
// true of the conf that is applied here.
func (g *Group) Pursue(o Order) OrderState {
	if g.applied.Term != g.hard.Term {
		return OrderOpen // changes that were committed before may not be applied yet
	}
	state, next := g.stepOf(o)
	if !g.Leading() || next == nil || g.changing > g.applied.Index {
		return state
	}
	for _, r := range o.Remove {
		if r == g.cfg.Replica && next.Kind == Replace {
			g.SendLeaderAway() // a leader does not take itself out
			return state
		}
	}
	g.ChangeMembers(*next, func(uint64, wire.Status) {})
	return state
}

// stepOf is the state of an order, and the change that is due, if any.
func (g *Group) stepOf(o Order) (OrderState, *Change) {
	role := func(r block.ReplicaID) Role {
		for _, m := range g.conf.Members {
			if m.Replica == r {
				return m.Role
			}
		}
		return 0
	}
	added, voting, gone := 0, 0, 0
	fresh := g.conf.Index == o.Base // and all ids can still be given out
	for _, m := range o.Add {
		fresh = fresh && m.Replica > g.conf.LastReplica
		switch role(m.Replica) {
		case Learner:
			added++
		case Voter:
			added, voting = added+1, voting+1
		case VoterIncoming:
			return OrderOpen, nil
		}
	}
	for _, r := range o.Remove {
		switch role(r) {
		case 0:
			gone++
		case VoterOutgoing:
			return OrderOpen, nil
		}
	}
	switch {
	case g.conf.joint():
		return OrderVoid, nil
	case voting == len(o.Add) && gone == len(o.Remove):
		return OrderDone, nil
	case o.GivenUp && voting == 0 && added > 0:
		return OrderOpen, &Change{Kind: DropLearner, Base: g.conf.Index, Remove: replicasOf(o.Add)}
	case o.GivenUp && fresh:
		// Made learners, so that their ids are used up; then dropped.
		return OrderOpen, &Change{Kind: AddLearner, Base: o.Base, Members: o.Add}
	case o.GivenUp:
		return OrderVoid, nil
	case voting == 0 && added == len(o.Add) && gone == 0:
		if !g.caughtUp(o.Add) {
			return OrderOpen, nil
		}
		return OrderOpen, &Change{Kind: Replace, Base: g.conf.Index, Members: o.Add, Remove: o.Remove}
	case added == 0 && gone == 0 && fresh:
		return OrderOpen, &Change{Kind: AddLearner, Base: o.Base, Members: o.Add}
	case voting == 0 && added == len(o.Add): // and those that they were to replace are gone
		return OrderOpen, &Change{Kind: DropLearner, Base: g.conf.Index, Remove: replicasOf(o.Add)}
	}
	return OrderVoid, nil
}

func replicasOf(members []Member) []block.ReplicaID {
	ids := make([]block.ReplicaID, len(members))
	for i, m := range members {
		ids[i] = m.Replica
	}
	return ids
}

// caughtUp tells whether the learners hold all up to the entry that made them
// learners, at least, and nearly all that is committed. That they count as
// active proves nothing: the library takes that of new ones for granted.
func (g *Group) caughtUp(learners []Member) bool {
	caught := 0
	for _, p := range g.Progress() {
		for _, m := range learners {
			if p.Member.Replica == m.Replica && p.Active && !p.NeedsCopy && p.Match >= g.conf.Index && p.Match+caughtUpEntries >= g.commit {
				caught++
			}
		}
	}
	return caught == len(learners)
}
