package wire

import (
	"firn.io/firn/internal/block"
)

// RequestKind says what a gateway asks of a node. Values travel.
type RequestKind uint8

const (
	// ReqPropose asks the group's leader to replicate Command.
	ReqPropose RequestKind = 1
	// ReqRead asks a replica for the blocks [Block, Block+Count) of Chunk.
	ReqRead RequestKind = 2
	// ReqMap asks which blocks of [Chunk, ToChunk) hold data.
	ReqMap RequestKind = 3
	// ReqRecord asks the leader (by ReadIndex) for the volume's record.
	ReqRecord RequestKind = 4
	// ReqHealth asks a node how it is: no group is meant. Response.Health answers.
	ReqHealth RequestKind = 5
)

// Request is one operation on one group. ID is unique per connection.
type Request struct {
	ID     uint64
	Kind   RequestKind
	Group  block.GroupID
	Layout block.LayoutVersion

	// ReqPropose. The payload, if any, is the message's only payload buffer.
	Command Command

	// ReqRead, ReqMap, ReqRecord.
	Volume     block.VolumeID
	Epoch      block.Epoch
	Nonce      block.Nonce
	Generation block.Generation // of the view; GenerationLatest
	Chunk      block.Chunk
	ToChunk    block.Chunk
	Block      block.Index
	Count      uint16
	// Token: the replica answers once its applied index is at or above it (R1).
	Token block.Version
	// LeaderOnly asks for ReadIndex at the leader, and for the epoch in the
	// group's record to be checked after it (F4).
	LeaderOnly bool
}

// Status says how a node took a request. Values travel.
type Status uint8

const (
	// StatusOK: the answer is in the response. For ReqPropose, apply answered.
	StatusOK Status = 1
	// StatusNotLeader: Leader is where to go, if known. Nothing was proposed.
	StatusNotLeader Status = 2
	// StatusUnknownGroup: this node has no replica of the group.
	StatusUnknownGroup Status = 3
	// StatusStaleLayout: the request's layout version is older than NewLayout.
	StatusStaleLayout Status = 4
	// StatusDropped: the proposal was lost on its way (leader change, full
	// queue). Its effect is unknown; try again with the same opSeq.
	StatusDropped Status = 5
	// StatusNoSpace: refused before it was proposed, by free space (S7).
	StatusNoSpace Status = 6
	// StatusBusy: refused before it was proposed, by a queue's limit; try again.
	StatusBusy Status = 7
	// StatusFenced: a read under an epoch that the group's record does not hold.
	StatusFenced Status = 8
	// StatusCorrupt: bytes failed their checksum here; another replica may do.
	StatusCorrupt Status = 9
	// StatusNotReady: the replica starts, lags behind Token, or is being filled.
	StatusNotReady Status = 10
	// StatusInvalid: the request does not decode or does not make sense.
	StatusInvalid Status = 11
	// StatusNoVolume: the volume is unknown in the group, or a tombstone.
	StatusNoVolume Status = 12
)

// Run is a run of blocks in one state, within one chunk.
type Run struct {
	Chunk block.Chunk
	Block block.Index
	Count uint16
	State block.ExtentState
}

// MaxRuns bounds the runs of one response.
const MaxRuns = 8192

// Response answers the request of the same ID.
type Response struct {
	ID     uint64
	Status Status
	Group  block.GroupID
	// Leader is the node that leads the group as far as known, else 0.
	Leader block.NodeID
	// Applied raises the token (R1): the applied index of the view that answered.
	Applied   block.Version
	NewLayout block.LayoutVersion
	Text      string // why, for people; at most 1 KiB

	Result ApplyResult // ReqPropose; ReqRecord uses Result.Record

	// ReqRead: Runs cover the range in order. The message's payload buffers, in
	// order, hold the bytes of the Data runs; CRCs has one per data block, from
	// the index, for the gateway to verify.
	Runs []Run
	CRCs []uint32
	// ReqHealth: see DecodeHealth.
	Health []byte
	// ReqMap: everything in [Chunk, Covered) of this group that is not in Runs
	// is a hole.
	Covered block.Chunk
}
