// Package scsi is a direct-access SCSI device (SPC-4, SBC-3) over a
// block.Device. It knows no network: a transport hands it command descriptor
// blocks with the nexus they came through, and carries data and answers.
//
// A Unit is a logical unit. It holds what its initiators share: unit attentions
// per I_T nexus, reservations, mode parameters. Its methods may be called by
// many goroutines at once; commands run in any order, as the transport starts
// them (SAM-5: simple tasks; order among them is the transport's to keep).
//
// All that an initiator sends is checked: a CDB or a parameter list that makes
// no sense ends in CHECK CONDITION, never in a panic, and never allocates by a
// length that it claims.
package scsi

// Status is the SCSI status of a command (SAM-5, 5.3).
type Status uint8

// The statuses that are used.
const (
	Good                Status = 0x00
	CheckCondition      Status = 0x02
	Busy                Status = 0x08
	ReservationConflict Status = 0x18
	TaskSetFull         Status = 0x28
	TaskAborted         Status = 0x40
)

// Opcodes of SPC and SBC that this device knows.
const (
	opTestUnitReady     = 0x00
	opRequestSense      = 0x03
	opRead6             = 0x08
	opWrite6            = 0x0a
	opInquiry           = 0x12
	opModeSelect6       = 0x15
	opReserve6          = 0x16
	opRelease6          = 0x17
	opModeSense6        = 0x1a
	opStartStop         = 0x1b
	opPreventAllow      = 0x1e
	opReadCapacity10    = 0x25
	opRead10            = 0x28
	opWrite10           = 0x2a
	opWriteVerify10     = 0x2e
	opVerify10          = 0x2f
	opPrefetch10        = 0x34
	opSyncCache10       = 0x35
	opWriteSame10       = 0x41
	opUnmap             = 0x42
	opModeSelect10      = 0x55
	opReserve10         = 0x56
	opRelease10         = 0x57
	opModeSense10       = 0x5a
	opPersistentIn      = 0x5e
	opPersistentOut     = 0x5f
	opExtendedCopy      = 0x83
	opCopyResults       = 0x84
	opRead16            = 0x88
	opCompareAndWrite   = 0x89
	opWrite16           = 0x8a
	opOrWrite16         = 0x8b
	opWriteVerify16     = 0x8e
	opVerify16          = 0x8f
	opPrefetch16        = 0x90
	opSyncCache16       = 0x91
	opWriteSame16       = 0x93
	opServiceIn16       = 0x9e
	opReportLUNs        = 0xa0
	opMaintenanceIn     = 0xa3
	opMaintenanceOut    = 0xa4
	opRead12            = 0xa8
	opWrite12           = 0xaa
	opWriteVerify12     = 0xae
	opVerify12          = 0xaf
	actReadCapacity16   = 0x10
	actGetLBAStatus     = 0x12
	actReportGroups     = 0x0a
	actReportOpcodes    = 0x0c
	actReportTaskMgmt   = 0x0d
	actSetGroups        = 0x0a
	actCopyLID1         = 0x00
	actCopyStatus       = 0x00
	actCopyReceiveData  = 0x01
	actCopyParameters   = 0x03
	actCopyFailedDetail = 0x04
)

// Limits of one command, as VPD page B0 tells them.
const (
	// MaxTransferBytes bounds the data of one read or write.
	MaxTransferBytes = 8 << 20
	// optimalBytes is what the cluster likes: one Raft entry.
	optimalBytes = 1 << 20
	// maxWriteSameBytes bounds WRITE SAME, which may have a pattern to write.
	maxWriteSameBytes = 16 << 20
	// maxUnmapRanges bounds the descriptors of an UNMAP, maxUnmapBlocks what each
	// of its commands may let go of.
	maxUnmapRanges = 256
	maxUnmapBlocks = 1<<32 - 1
	// maxCompareBlocks bounds COMPARE AND WRITE.
	maxCompareBlocks = 128
	// maxParameterBytes bounds every parameter list but the data of writes.
	maxParameterBytes = 64 << 10
	// maxInBytes bounds every answer but the data of reads.
	maxInBytes = 64 << 10
)
