# Fails if OBJECT defines a weak function outside its instruction set's namespace, pddm::ISA. (Weak data, such as type
# information, holds no instructions.)
execute_process(COMMAND ${NM} -C ${OBJECT} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NM} ${OBJECT} failed")
endif()
string(REGEX MATCHALL "[^\n]+ W [^\n]+" weak "${symbols}")
foreach(symbol IN LISTS weak)
  # An instantiation over this set's own types is as private as the types.
  if(NOT symbol MATCHES "pddm::${ISA}::")
    message(SEND_ERROR "shared symbol in ${ISA}: ${symbol}")
  endif()
endforeach()
