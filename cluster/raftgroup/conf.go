package raftgroup

import (
	"encoding/binary"
	"slices"

	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/internal/block"
)

// Member is one replica of a group and the node it lives on.
type Member struct {
	Replica block.ReplicaID
	Node    block.NodeID
	Role    Role
}

// Role is a member's part in elections and commits. Values are stored.
type Role uint8

const (
	// Voter counts in both majorities of a joint change.
	Voter Role = 1
	// Learner receives entries and does not count.
	Learner Role = 2
	// VoterOutgoing counts in the old majority of a joint change only.
	VoterOutgoing Role = 3
	// VoterIncoming counts in the new majority of a joint change only.
	VoterIncoming Role = 4
	// VoterDemoting counts in the old majority and becomes a learner.
	VoterDemoting Role = 5
)

// Conf is the members of a group. It is part of the replicated state and is
// stored encoded.
type Conf struct {
	// Index is the Raft index of the entry that decided it; orders that name
	// another one are void (C2).
	Index uint64
	// LastReplica is the highest replica id ever given out in the group; the
	// next one is above it (C1).
	LastReplica block.ReplicaID
	// Members are in the order of their replica ids.
	Members []Member
	// AutoLeave says that a joint change ends by itself.
	AutoLeave bool
}

// NewConf is the conf of a new group whose members all vote.
func NewConf(members map[block.ReplicaID]block.NodeID) Conf {
	c := Conf{Index: InitialIndex}
	for r, n := range members {
		c.Members = append(c.Members, Member{Replica: r, Node: n, Role: Voter})
		c.LastReplica = max(c.LastReplica, r)
	}
	c.sort()
	return c
}

func (c *Conf) sort() {
	slices.SortFunc(c.Members, func(a, b Member) int {
		switch {
		case a.Replica < b.Replica:
			return -1
		case a.Replica > b.Replica:
			return 1
		}
		return 0
	})
}

// NodeOf returns the node of a member.
func (c *Conf) NodeOf(r block.ReplicaID) (block.NodeID, bool) {
	for _, m := range c.Members {
		if m.Replica == r {
			return m.Node, true
		}
	}
	return 0, false
}

// The encoding: version, flags, index, last replica, count, then per member
// replica, node and role. Little-endian, fixed width.
const (
	confVersion     = 1
	confHead        = 1 + 1 + 8 + 8 + 2
	confMember      = 8 + 4 + 1
	confMaxMembers  = 64
	confAutoLeave   = 1 << 0
	confFlagsKnown  = confAutoLeave
	confMaxEncoding = confHead + confMaxMembers*confMember
)

// Append appends the encoding of c to dst.
func (c *Conf) Append(dst []byte) []byte {
	var flags byte
	if c.AutoLeave {
		flags |= confAutoLeave
	}
	dst = append(dst, confVersion, flags)
	dst = binary.LittleEndian.AppendUint64(dst, c.Index)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(c.LastReplica))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(c.Members)))
	for _, m := range c.Members {
		dst = binary.LittleEndian.AppendUint64(dst, uint64(m.Replica))
		dst = binary.LittleEndian.AppendUint32(dst, uint32(m.Node))
		dst = append(dst, byte(m.Role))
	}
	return dst
}

// DecodeConf is the inverse of Append. Kinds Unsupported, Corrupt.
func DecodeConf(p []byte) (Conf, error) {
	var c Conf
	switch {
	case len(p) < confHead || len(p) > confMaxEncoding:
		return c, block.Errorf(block.Corrupt, "group members: %d bytes", len(p))
	case p[0] != confVersion || p[1]&^confFlagsKnown != 0:
		return c, block.Errorf(block.Unsupported, "group members: version %d, flags %#x", p[0], p[1])
	}
	c.AutoLeave = p[1]&confAutoLeave != 0
	c.Index = binary.LittleEndian.Uint64(p[2:])
	c.LastReplica = block.ReplicaID(binary.LittleEndian.Uint64(p[10:]))
	n := int(binary.LittleEndian.Uint16(p[18:]))
	p = p[confHead:]
	if len(p) != n*confMember || n == 0 {
		return c, block.Errorf(block.Corrupt, "group members: %d members in %d bytes", n, len(p))
	}
	c.Members = make([]Member, n)
	for i := range c.Members {
		m := Member{
			Replica: block.ReplicaID(binary.LittleEndian.Uint64(p)),
			Node:    block.NodeID(binary.LittleEndian.Uint32(p[8:])),
			Role:    Role(p[12]),
		}
		p = p[confMember:]
		if m.Replica == 0 || m.Replica > c.LastReplica || m.Role < Voter || m.Role > VoterDemoting ||
			i > 0 && m.Replica <= c.Members[i-1].Replica {
			return c, block.Errorf(block.Corrupt, "group members: member %d (%d) does not make sense", i, m.Replica)
		}
		c.Members[i] = m
	}
	return c, nil
}

// state is the library's form.
func (c *Conf) state() *pb.ConfState {
	cs := &pb.ConfState{}
	for _, m := range c.Members {
		id := uint64(m.Replica)
		switch m.Role {
		case Voter:
			cs.Voters = append(cs.Voters, id)
		case Learner:
			cs.Learners = append(cs.Learners, id)
		case VoterIncoming:
			cs.Voters = append(cs.Voters, id)
		case VoterOutgoing:
			cs.VotersOutgoing = append(cs.VotersOutgoing, id)
		case VoterDemoting:
			cs.VotersOutgoing = append(cs.VotersOutgoing, id)
			cs.LearnersNext = append(cs.LearnersNext, id)
		}
	}
	if len(cs.VotersOutgoing) > 0 || c.joint() {
		for _, m := range c.Members {
			if m.Role == Voter {
				cs.VotersOutgoing = append(cs.VotersOutgoing, uint64(m.Replica))
			}
		}
		slices.Sort(cs.VotersOutgoing)
		cs.AutoLeave = &c.AutoLeave
	}
	return cs
}

func (c *Conf) joint() bool {
	return slices.ContainsFunc(c.Members, func(m Member) bool {
		return m.Role == VoterIncoming || m.Role == VoterOutgoing || m.Role == VoterDemoting
	})
}

// sole tells whether r is the only voter.
func (c *Conf) sole(r block.ReplicaID) bool {
	cs := c.state()
	return len(cs.Voters) == 1 && cs.Voters[0] == uint64(r) && len(cs.VotersOutgoing) == 0
}
