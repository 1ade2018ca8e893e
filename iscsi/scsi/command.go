package scsi

// flags say how a command stands to attentions and reservations.
type flags uint8

const (
	// always runs also while an attention waits.
	always flags = 1 << iota
	// reads and writes touch the medium: what reservations speak about.
	reads
	writes
	// unreserved runs under every persistent reservation, spc2 under RESERVE too.
	unreserved
	spc2
)

// command describes one CDB: its row in REPORT SUPPORTED OPERATION CODES, what
// data it takes, and what runs it.
type command struct {
	opcode byte
	// action is the service action, -1 without one.
	action int
	length int
	flags  flags
	// usage has a 1 for each bit of the CDB that is looked at, from byte 1 on;
	// the service action's bits are those of the action itself.
	usage []byte
	// out is the number of bytes that the command takes; nil: none.
	out func(cdb []byte, blockBytes int64) int64
	run func(*call)
}

// control is where the control byte stands.
func (c *command) control() int { return c.length - 1 }

// commands is in the order of opcodes and actions.
var commands []command

// byOpcode finds the first of an opcode's commands in commands; -1: none.
var byOpcode [256]int

func hasActions(op byte) bool { return byOpcode[op] >= 0 && commands[byOpcode[op]].action >= 0 }

func find(cdb []byte) *command {
	if len(cdb) < 6 {
		return nil
	}
	i := byOpcode[cdb[0]]
	if i < 0 {
		return nil
	}
	for ; i < len(commands) && commands[i].opcode == cdb[0]; i++ {
		if a := commands[i].action; a < 0 || a == int(cdb[1]&0x1f) {
			return &commands[i]
		}
	}
	return nil
}

// listLength makes an out of a parameter list length that at reads.
func listLength(at func([]byte) uint64) func([]byte, int64) int64 {
	return func(cdb []byte, _ int64) int64 { return int64(min(at(cdb), maxParameterBytes)) }
}

func at4(cdb []byte) uint64  { return uint64(cdb[4]) }
func at7(cdb []byte) uint64  { return uint64(be16(cdb[7:])) }
func at5(cdb []byte) uint64  { return uint64(be32(cdb[5:])) }
func at10(cdb []byte) uint64 { return uint64(be32(cdb[10:])) }

// data is the out of writes.
func data(cdb []byte, blockBytes int64) int64 {
	r, _ := parseRange(cdb)
	return int64(r.blocks) * blockBytes
}

// verifyData is the out of VERIFY, which takes data to compare if BYTCHK asks.
func verifyData(cdb []byte, blockBytes int64) int64 {
	r, _ := parseRange(cdb)
	switch cdb[1] >> 1 & 3 {
	case 1:
		return int64(r.blocks) * blockBytes
	case 3:
		return blockBytes
	}
	return 0
}

// oneBlock is the out of WRITE SAME; with NDOB it takes none.
func oneBlock(cdb []byte, blockBytes int64) int64 {
	if cdb[0] == opWriteSame16 && cdb[1]&1 != 0 {
		return 0
	}
	return blockBytes
}

// compareData is the out of COMPARE AND WRITE: what to find, then what to write.
func compareData(cdb []byte, blockBytes int64) int64 { return 2 * int64(cdb[13]) * blockBytes }

var (
	usage6    = []byte{0x1f, 0xff, 0xff, 0xff, 0x04}
	usage10   = []byte{0xf8, 0xff, 0xff, 0xff, 0xff, 0x3f, 0xff, 0xff, 0x04}
	usage12   = []byte{0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f, 0x04}
	usage16   = []byte{0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f, 0x04}
	usageList = []byte{0x1f, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0x04}
)

func with(usage []byte, at int, v byte) []byte {
	u := append([]byte(nil), usage...)
	u[at-1] = v
	return u
}

func init() {
	commands = []command{
		{opTestUnitReady, -1, 6, unreserved, []byte{0, 0, 0, 0, 0x04}, nil, func(*call) {}},
		{opRequestSense, -1, 6, always | unreserved | spc2, []byte{0x01, 0, 0, 0xff, 0x04}, nil, (*call).requestSense},
		{opRead6, -1, 6, reads, usage6, nil, (*call).read},
		{opWrite6, -1, 6, writes, usage6, data, (*call).write},
		{opInquiry, -1, 6, always | unreserved | spc2, []byte{0x01, 0xff, 0xff, 0xff, 0x04}, nil, (*call).inquiry},
		{opModeSelect6, -1, 6, writes, []byte{0x11, 0, 0, 0xff, 0x04}, listLength(at4), (*call).modeSelect},
		{opReserve6, -1, 6, 0, []byte{0, 0, 0, 0, 0x04}, nil, (*call).reserve},
		{opRelease6, -1, 6, spc2, []byte{0, 0, 0, 0, 0x04}, nil, (*call).release},
		{opModeSense6, -1, 6, reads, []byte{0x08, 0xff, 0xff, 0xff, 0x04}, nil, (*call).modeSense},
		{opStartStop, -1, 6, reads, []byte{0x01, 0, 0x0f, 0xf7, 0x04}, nil, (*call).startStop},
		{opPreventAllow, -1, 6, reads, []byte{0, 0, 0, 0x03, 0x04}, nil, (*call).preventAllow},
		{opReadCapacity10, -1, 10, unreserved, []byte{0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0x01, 0x04}, nil, (*call).readCapacity10},
		{opRead10, -1, 10, reads, usage10, nil, (*call).read},
		{opWrite10, -1, 10, writes, usage10, data, (*call).write},
		{opWriteVerify10, -1, 10, writes, with(usage10, 1, 0xf6), data, (*call).write},
		{opVerify10, -1, 10, reads, with(usage10, 1, 0xf6), verifyData, (*call).verify},
		{opPrefetch10, -1, 10, reads, with(usage10, 1, 0x02), nil, (*call).prefetch},
		{opSyncCache10, -1, 10, writes, with(usage10, 1, 0x02), nil, (*call).syncCache},
		{opWriteSame10, -1, 10, writes, with(usage10, 1, 0xf8), oneBlock, (*call).writeSame},
		{opUnmap, -1, 10, writes, []byte{0x01, 0, 0, 0, 0, 0x3f, 0xff, 0xff, 0x04}, listLength(at7), (*call).unmap},
		{opModeSelect10, -1, 10, writes, []byte{0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04}, listLength(at7), (*call).modeSelect},
		{opReserve10, -1, 10, 0, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0x04}, nil, (*call).reserve},
		{opRelease10, -1, 10, spc2, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0x04}, nil, (*call).release},
		{opModeSense10, -1, 10, reads, []byte{0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0x04}, nil, (*call).modeSense},
		{opPersistentIn, prReadKeys, 10, unreserved, persistentUsage, nil, (*call).persistentIn},
		{opPersistentIn, prReadReservation, 10, unreserved, persistentUsage, nil, (*call).persistentIn},
		{opPersistentIn, prReportCapabilities, 10, unreserved, persistentUsage, nil, (*call).persistentIn},
		{opPersistentIn, prReadFullStatus, 10, unreserved, persistentUsage, nil, (*call).persistentIn},
	}
	for action := prRegister; action <= prRegisterMove; action++ {
		commands = append(commands, command{opPersistentOut, action, 10, unreserved, []byte{0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04}, listLength(at5), (*call).persistentOut})
	}
	commands = append(commands, []command{
		{opExtendedCopy, actCopyLID1, 16, writes, []byte{0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04}, listLength(at10), (*call).extendedCopy},
		{opCopyResults, actCopyStatus, 16, unreserved, copyResultsUsage, nil, (*call).copyResults},
		{opCopyResults, actCopyReceiveData, 16, unreserved, copyResultsUsage, nil, (*call).copyResults},
		{opCopyResults, actCopyParameters, 16, unreserved, copyResultsUsage, nil, (*call).copyResults},
		{opCopyResults, actCopyFailedDetail, 16, unreserved, copyResultsUsage, nil, (*call).copyResults},
		{opRead16, -1, 16, reads, usage16, nil, (*call).read},
		{opCompareAndWrite, -1, 16, writes, with(with(with(with(usage16, 10, 0), 11, 0), 12, 0), 13, 0xff), compareData, (*call).compareAndWrite},
		{opWrite16, -1, 16, writes, usage16, data, (*call).write},
		{opOrWrite16, -1, 16, writes, usage16, data, (*call).orWrite},
		{opWriteVerify16, -1, 16, writes, with(usage16, 1, 0xf6), data, (*call).write},
		{opVerify16, -1, 16, reads, with(usage16, 1, 0xf6), verifyData, (*call).verify},
		{opPrefetch16, -1, 16, reads, with(usage16, 1, 0x02), nil, (*call).prefetch},
		{opSyncCache16, -1, 16, writes, with(usage16, 1, 0x02), nil, (*call).syncCache},
		{opWriteSame16, -1, 16, writes, with(usage16, 1, 0xf9), oneBlock, (*call).writeSame},
		{opServiceIn16, actReadCapacity16, 16, unreserved, with(with(usage16, 1, 0x1f), 14, 0x01), nil, (*call).readCapacity16},
		{opServiceIn16, actGetLBAStatus, 16, reads, with(with(usage16, 1, 0x1f), 14, 0), nil, (*call).lbaStatus},
		{opReportLUNs, -1, 12, always | unreserved | spc2, []byte{0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04}, nil, (*call).reportLUNs},
		{opMaintenanceIn, actReportGroups, 12, unreserved, with(usageList, 1, 0xff), nil, (*call).reportGroups},
		{opMaintenanceIn, actReportOpcodes, 12, unreserved, []byte{0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04}, nil, (*call).reportOpcodes},
		{opMaintenanceIn, actReportTaskMgmt, 12, unreserved, with(usageList, 2, 0x80), nil, (*call).reportTaskMgmt},
		{opRead12, -1, 12, reads, usage12, nil, (*call).read},
		{opWrite12, -1, 12, writes, usage12, data, (*call).write},
		{opWriteVerify12, -1, 12, writes, with(usage12, 1, 0xf6), data, (*call).write},
		{opVerify12, -1, 12, reads, with(usage12, 1, 0xf6), verifyData, (*call).verify},
	}...)
	for i := range byOpcode {
		byOpcode[i] = -1
	}
	for i := len(commands) - 1; i >= 0; i-- {
		byOpcode[commands[i].opcode] = i
	}
}
