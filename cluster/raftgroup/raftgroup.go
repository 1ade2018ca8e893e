// Package raftgroup drives the Raft library (it is its only importer) for all
// groups of a node on one Loop: proposals, replication, apply, current reads,
// leadership. It is a single-threaded core: everything is called on the Loop.
//
// A Host holds the groups. Per turn of the loop each group that something
// happened to makes at most one MsgProp and is drained of its Readys once, at
// the turn's end; what it sends and writes is gathered further by transport
// and by the log of its disk.
//
// Payloads travel by reference: a Raft entry's Data is the encoded wire.Command
// (some hundred bytes), its payload is a payload.Buf kept beside it by
// (index, term), attached to messages and to log writes. It is held until the
// entry is locally durable, then within a byte budget of the node, and re-read
// from the log when a follower that lags needs it again.
//
// What raftgroup needs of others it declares here: Log (what the disk's log
// gives for one replica), StateMachine (what apply changes), Sender (the way to
// other nodes).
package raftgroup

import (
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// A new group has no bootstrap entries: each replica's log starts as if it had
// been truncated at this index and term, and its state machine as if it had
// applied up to there, with the initial Conf given.
const (
	InitialIndex = 10
	InitialTerm  = 5
)

// HardState is what Raft must not forget besides entries. Vote is a replica id
// of the group, 0 for none.
type HardState struct {
	Term, Vote, Commit uint64
}

// LogEntry is one entry as the log stores it. Data is opaque to the log. The
// payload, if any, is stored beside it, 4 KiB-aligned.
type LogEntry struct {
	Term, Index uint64
	Data        []byte
	Payload     *payload.Buf // nil when the entry has none
}

// EntryID names one entry of a group's log for good: two entries with the same
// index and term are the same entry.
type EntryID struct {
	Index, Term uint64
}

// LogWrite is one atomic write to a replica's log. Nil and empty parts are absent.
type LogWrite struct {
	// Entries are contiguous; the first one's index i discards all entries >= i
	// that the log holds. The log takes its own hold of payloads if it keeps
	// them past the return of Append.
	Entries   []LogEntry
	HardState *HardState
	// Truncate forgets all entries up to and including its index. If the log
	// ends below it, or has another term there, the whole log is emptied (L6).
	Truncate *EntryID
}

// Log is one replica's log on its disk. All methods but Read are called on the
// Loop and read memory only.
type Log interface {
	// FirstIndex is the index after the truncation; LastIndex is that of the
	// newest entry, FirstIndex-1 when there is none. Both see appends at once,
	// durable or not.
	FirstIndex() uint64
	LastIndex() uint64
	// Term is the term of entry i, for i in [FirstIndex-1, LastIndex].
	Term(i uint64) (uint64, bool)
	// HardState is the newest one that was durable at open; it is asked once.
	HardState() HardState
	// Append queues w. done is called on the Loop once w and all earlier
	// writes are durable, in the order of the calls; an error is final (L8).
	Append(w LogWrite, done func(error))
	// Read returns consecutive entries from lo on, below hi: at least one,
	// then as many as fit maxBytes of payload and data together. It blocks, and
	// is called off the Loop. With payloads set, each entry that has a payload
	// carries it, with one hold for the caller, its CRCs checked (kind Corrupt).
	Read(lo, hi uint64, maxBytes int, payloads bool) ([]LogEntry, error)
}

// StateMachine is one replica's replicated state. Its methods change memory
// only and are deterministic. They are called in the order of indexes, each
// index once (with what is re-applied at open: from Applied()+1 on).
type StateMachine interface {
	// Applied is the last applied index and its term.
	Applied() EntryID
	// Conf is what ApplyConf, or the group's creation, gave last: an encoded Conf.
	Conf() []byte
	// Apply applies a command. cmd is valid during the call; its slices may be
	// kept. An error halts the replica (S6).
	Apply(id EntryID, cmd *wire.Command) (wire.ApplyResult, error)
	// ApplyEmpty notes an entry without effect (a new leader's first).
	ApplyEmpty(id EntryID)
	// ApplyConf notes a change of members: the encoded Conf after it.
	ApplyConf(id EntryID, conf []byte)
}

// Sender is the way to other nodes.
type Sender interface {
	// Peer returns the connection to the node, nil if its address is unknown.
	Peer(node block.NodeID) transport.Peer
}

// GroupConfig says what a replica is made of.
type GroupConfig struct {
	Group   block.GroupID
	Replica block.ReplicaID
	// Disk is where Log is: leaders move off a disk that does not sync.
	Disk  block.DiskID
	Log   Log
	State StateMachine
	// Loop is where Log is read, that of its disk. Nil: the host's.
	Loop loop.Loop
	// Changed, if set, is called after the leader that this replica knows of,
	// or the replica's own role, has changed.
	Changed func(*Group)
	// Behind, if set, is called on a follower whose next entries the leader's log
	// has forgotten, until it has caught up: every second or two. at is what the
	// leader had applied; the state of any replica that has applied so much or
	// more will do. The owner closes the group, brings state and log to where
	// another replica is, and opens it again; or it lets the offer pass. The log
	// needs nothing: opening empties one that ends below what is applied (L6).
	Behind func(g *Group, leader block.NodeID, at EntryID)
	// Failed, if set, is called once when the replica halts: its log failed, its
	// state machine refused an entry, or its log is damaged. Nothing more is
	// done with the replica, until it is closed.
	Failed func(*Group, error)
}
